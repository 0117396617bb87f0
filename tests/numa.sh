#!/bin/bash
# Placement of weights on a virtual machine with two sockets and two memory nodes: builds
# tests/numa_probe.c, boots a kernel with it as the only program, and passes on what it says. Needs
# qemu-system-x86, cpio and a kernel (KERNEL=..., or Debian's package linux-image-amd64, which is
# fetched, not installed). The last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/.." || exit 1
build=${1:-build}
dir=$build/numa
mkdir -p "$dir/root"
fail() { echo "$*"; echo "0 passed, 1 failed"; exit 1; }
for tool in qemu-system-x86_64 cpio; do
    command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install qemu-system-x86 cpio"
done

kernel=${KERNEL:-$dir/vmlinuz}
if [ ! -s "$kernel" ]; then
    package=$(apt-cache depends linux-image-amd64 | grep -o 'linux-image-[0-9][^ ]*amd64$' | head -n 1)
    (cd "$dir" && apt-get download "$package" && dpkg-deb -x "$package"_*.deb kernel &&
        cp kernel/boot/vmlinuz-* vmlinuz && rm -rf kernel ./*.deb) >"$dir/kernel.log" 2>&1 ||
        fail "no kernel: see $dir/kernel.log"
fi

${CC:-gcc} -O1 -static tests/numa_probe.c -o "$dir/root/init" -lm -lpthread || fail "cannot build"
(cd "$dir/root" && echo init | cpio -o -H newc --quiet | gzip) >"$dir/initrd.gz"

timeout "${TEST_TIMEOUT:-300}" qemu-system-x86_64 -accel tcg -cpu max -m 1024 -nographic -no-reboot \
    -smp 4,sockets=2,cores=2 -object memory-backend-ram,id=m0,size=512M \
    -object memory-backend-ram,id=m1,size=512M -numa node,nodeid=0,cpus=0-1,memdev=m0 \
    -numa node,nodeid=1,cpus=2-3,memdev=m1 -kernel "$kernel" -initrd "$dir/initrd.gz" \
    -append "console=ttyS0 quiet panic=-1" </dev/null 2>&1 | tr -d '\r' >"$dir/log"
grep -aE '^ |^[a-z_]+$|passed' "$dir/log"
grep -aqE '^[0-9]+ passed, 0 failed$' "$dir/log" || fail "see $dir/log"
