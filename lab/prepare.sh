#!/bin/sh
# prepare.sh lab|test|bench [frr]: what this goal needs from Debian and does not find, it names, with the reason, and
# installs as root; without root it says the one line to type. Finds everything there: says nothing, a few ms.
set -eu
goal=${1:?usage: prepare.sh lab|test|bench [frr]} tor=${2:-bird}
cd "$(dirname "$0")/.."

packages='' services=''
need() { # need PACKAGE WHY CHECK...: the package is missing when the check fails
    package=$1 why=$2
    shift 2
    "$@" >/dev/null 2>&1 && return
    [ -n "$packages" ] || echo "missing on this machine:"
    printf '  %-28s%s\n' "$package" "$why"
    packages="$packages $package"
}
has() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1"; }
python_ok() { python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'; }
shim_cc() { [ -x build/underlay-shim ] || has gcc; }
static_busybox() { [ -x /bin/busybox ] && ! ldd /bin/busybox; }

need iproute2 "ip: namespaces, links, routes" has ip
need python3-venv "Python 3.11 or newer with venv: the product itself" python_ok
need gcc "a compiler: builds the CNI shim" shim_cc
need bird2 "BIRD: the routers of the lab" has bird
case $goal-$tor in lab-frr | test-*) need frr "FRR: the lab's other router" test -x /usr/lib/frr/bgpd ;; esac
case $goal in
lab) ;;
test)
    need iputils-ping "ping: what is lost while something is killed" has ping
    need iptables "iptables: what kube-proxy and portmap translate with" has iptables
    need nftables "nft: what others do to the table of the source check" has nft
    need traceroute "traceroute: the way that packets take" has traceroute
    need openssl "openssl: the keys of a Kubernetes API server" has openssl
    need containerd "containerd: the runtime that runs the plugin in earnest" has containerd
    need runc "runc: what containerd starts containers with" has runc
    need containernetworking-plugins "portmap, bandwidth, tuning: what is chained behind us" test -x /usr/lib/cni/portmap
    need busybox-static "busybox without libraries: the image of those containers" static_busybox
    if [ "$(uname -m)" = x86_64 ]; then
        need gcc-aarch64-linux-gnu "a compiler for arm64: builds the other shim" has aarch64-linux-gnu-gcc
        need qemu-user-static "qemu: runs that shim here" has qemu-aarch64-static
    fi
    need ca-certificates "whom to trust where Go's modules come from" test -s "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}"
    ;;
bench)
    need iputils-ping "ping: what is lost while something is killed" has ping
    need containernetworking-plugins "ptp and host-local: what we measure against" test -x /usr/lib/cni/ptp
    ;;
*) echo "prepare.sh: $goal? lab, test or bench" >&2; exit 2 ;;
esac
[ -n "$packages" ] || exit 0

install="apt-get install -y --no-install-recommends$packages"
if ! has apt-get >/dev/null; then
    echo "this is not a Debian: install the like of these by hand, then say 'make $goal' again" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "not root: type this, then 'make $goal' again" >&2
    echo "  sudo sh -c 'apt-get update && $install && systemctl disable --now bird frr containerd'" >&2
    exit 1
fi

# bird2, frr and containerd would start as services, and take this machine's routes in hand. Nobody asked for that.
policy=/usr/sbin/policy-rc.d
log=$(mktemp)
undo() {
    status=$?
    rm -f "$policy"
    if [ -e "$policy.underlay" ] || [ -L "$policy.underlay" ]; then mv "$policy.underlay" "$policy"; fi
    rm -f "$log"
    exit "$status"
}
trap undo EXIT
trap 'exit 1' INT TERM HUP
if [ -e "$policy" ] || [ -L "$policy" ]; then mv "$policy" "$policy.underlay"; fi
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"

export DEBIAN_FRONTEND=noninteractive
echo "$install"
quietly() { "$@" >"$log" 2>&1 </dev/null || { cat "$log" >&2; echo "failed: $*" >&2; exit 1; }; }
apt="apt-get -o DPkg::Lock::Timeout=300"
quietly $apt update
# shellcheck disable=SC2086  # a list of words
quietly $apt install -y --no-install-recommends $packages
for package in $packages; do
    case $package in bird2) services="$services bird" ;; frr | containerd) services="$services $package" ;; esac
done
for service in $services; do
    has systemctl >/dev/null || continue
    systemctl disable "$service" >"$log" 2>&1 || echo "the service $service starts at boot: systemctl disable $service"
done
