"""EdgeGuard hardens quantized vision models against adversarial patches and verifies the deployed integer engine."""

__version__ = "0.1.0"
