#!/usr/bin/env bash
# Prepares an emulated board: an aarch64 Debian in a folder, run by qemu's user-mode emulation, with the base install of this
# checkout in it. See docs/board.md.
#
#     tests/device/prepare_board.sh BOARD [--onnxruntime VERSION] [--mirror URL]
#     BOARD/bin/edgeguard serve ARTIFACT
#
# BOARD is laid out as a virtual environment: bin/python is this machine's qemu-aarch64-static on BOARD/root's Python. So neither
# chroot nor binfmt_misc nor root is needed to use it; to make it, debootstrap wants root or fakeroot. What is there and up to
# date is left as it is. Exit codes: 2 wrong use, 3 something is missing here, 1 a step failed.
set -euo pipefail

suite=bookworm
packages=libstdc++6,python3
onnxruntime=1.27.0 # later ones crash at import under qemu 7.2
mirror=
python=${PYTHON:-python3}
checkout=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

fail() {
  echo "prepare_board.sh: $2" >&2
  exit "$1"
}

board=
while (($#)); do
  case $1 in
    --onnxruntime | --mirror)
      [[ $# -ge 2 && -n $2 ]] || fail 2 "$1 needs a value"
      declare "${1#--}=$2"
      shift
      ;;
    -*) fail 2 "there is no option $1; use: prepare_board.sh BOARD [--onnxruntime VERSION] [--mirror URL]" ;;
    *)
      [[ -z $board && -n $1 ]] || fail 2 "expected one folder, got also '$1'"
      board=$1
      ;;
  esac
  shift
done
[[ -n $board ]] || fail 2 "name the folder for the board: prepare_board.sh BOARD"

PATH=$PATH:/usr/sbin # where debootstrap is, out of the way of users who are not root
for tool in qemu-aarch64-static debootstrap dpkg-deb tar; do
  command -v "$tool" >/dev/null || fail 3 "$tool is missing: apt-get install qemu-user-static debootstrap"
done
"$python" -m pip --version >/dev/null 2>&1 ||
  fail 3 "$python has no pip: apt-get install python3-pip, or name another Python with PYTHON="
[[ $board != *:* && $board != *$'\n'* ]] || fail 2 "the path of a board cannot hold ':', got $board"
mkdir -p "$board" || fail 2 "cannot make the folder $board"
board=$(CDPATH='' cd -- "$board" && pwd)
root=$board/root

# A system whose packages are unpacked and not configured: that would run programs of theirs, which takes binfmt_misc.
wanted="$suite $packages"
if [[ $(cat "$board/system" 2>/dev/null) != "$wanted" ]]; then
  pretend=()
  if ((EUID != 0)); then
    command -v fakeroot >/dev/null || fail 3 "debootstrap needs root or fakeroot: apt-get install fakeroot"
    pretend=(fakeroot)
  fi
  rm -rf "$board/system" "$root" "$board/stamp"
  echo "unpacking Debian $suite for arm64 in $root" >&2
  "${pretend[@]}" debootstrap --foreign --force-check-gpg --arch=arm64 --variant=minbase --include="$packages" \
    "$suite" "$root" ${mirror:+"$mirror"} >"$board/debootstrap.log" 2>&1 || {
    tail -n 5 "$board/debootstrap.log" >&2
    fail 1 "debootstrap failed; all that it said is in $board/debootstrap.log"
  }
  for package in "$root"/var/cache/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" |
      tar -x -C "$root" --no-same-owner --keep-directory-symlink --skip-old-files ||
      fail 1 "$package cannot be unpacked"
  done
  rm -rf "$root"/var/cache/apt/archives "$root"/debootstrap
  # What is not in the system is looked for outside of it, and these are better this machine's own.
  rm -rf --one-file-system "$root"/{dev,proc,sys,run,tmp,home,root} "$root"/etc/{hosts,hostname,resolv.conf}
  echo "$wanted" >"$board/system"
fi

mkdir -p "$board/bin"
cat >"$board/bin/python" <<'EOF'
#!/bin/sh
board=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
unset PYTHONPATH PYTHONHOME
exec qemu-aarch64-static -L "$board/root" -0 "$board/bin/python" "$board/root/usr/bin/python3" "$@"
EOF
chmod +x "$board/bin/python"
printf '%s\n' "home = $root/usr/bin" 'include-system-site-packages = false' >"$board/pyvenv.cfg"
version=$("$board/bin/python" -c 'import ssl, sys; print("%d.%d" % sys.version_info[:2])') ||
  fail 1 "the Python of $root does not run under $(qemu-aarch64-static --version | head -n 1)"
site=$board/lib/python$version/site-packages
mkdir -p "$site"

cd "$checkout"
sources=(pyproject.toml README.md LICENSE NOTICE edgeguard export targets calib)
stamp=$({
  echo "$onnxruntime $version $board"
  find "${sources[@]}" -type f ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
} | sha256sum)
if [[ $(cat "$board/stamp" 2>/dev/null) != "$stamp" ]]; then
  echo "installing edgeguard and onnxruntime $onnxruntime, emulated" >&2
  build=$(mktemp -d)
  trap 'rm -rf "$build"' EXIT
  cp -r "${sources[@]}" "$build"
  {
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$build/wheel" "$build" &&
      "$python" -m pip install --quiet --target "$build/pip" pip &&
      rm -rf "$board/stamp" "$site"/edgeguard "$site"/edgeguard-*.dist-info &&
      "$board/bin/python" "$build/pip/pip" install --no-compile --only-binary=:all: \
        "$build"/wheel/*.whl "onnxruntime==$onnxruntime"
  } >"$board/pip.log" 2>&1 || {
    tail -n 5 "$board/pip.log" >&2
    fail 1 "pip failed; all that it said is in $board/pip.log"
  }
  "$board/bin/edgeguard" doctor >"$board/doctor.log" 2>&1 || {
    tail -n 5 "$board/doctor.log" >&2
    fail 1 "edgeguard does not run on the board; a newer qemu or another --onnxruntime may help"
  }
  echo "$stamp" >"$board/stamp"
fi
echo "$board/bin/edgeguard"
