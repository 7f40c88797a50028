"""What the cluster changes on the host outside of files, and how it is put back."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hack.cluster.host import attempt, run
from hack.cluster.pins import Network
from hack.cluster.places import Layout

# Kernel settings, raised to at least this and put back by `down`.
SETTINGS = {
    "net/ipv4/ip_forward": 1,
    "net/bridge/bridge-nf-call-iptables": 1,
    # Every watcher of files is one; the usual 128 are soon gone with a kubelet beside an editor.
    "fs/inotify/max_user_instances": 1024,
}
# The kubelet sets these at its start and never puts them back.
SET_BY_KUBELET = (
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
)
SYSCTL = Path("/proc/sys")
NETNS = Path("/run/netns")


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What the host looked like before the first `up`."""

    settings: dict[str, str]
    tables: list[str]
    namespaces: list[str]


def prepare(layout: Layout, network: Network) -> None:
    """Give the host the node's address and the settings that pods need."""
    if not (SYSCTL / "net/bridge").exists():
        attempt(["modprobe", "br_netfilter"])
    if _before(layout) is None:
        before = Before(
            settings={
                name: _setting(name).read_text()
                for name in (*SETTINGS, *SET_BY_KUBELET)
                if _known(name)
            },
            tables=tables(),
            namespaces=_namespaces(),
        )
        _record(layout).write_text(json.dumps(asdict(before)))
    for name, least in SETTINGS.items():
        if _known(name) and int(_setting(name).read_text()) < least:
            _setting(name).write_text(str(least))
    run("ip", "address", "replace", f"{network.node_address}/32", "dev", "lo")


def was_prepared(layout: Layout) -> bool:
    """Say whether a cluster was started and not yet stopped here."""
    return _record(layout).exists()


def restore(layout: Layout, network: Network) -> None:
    """Put the host's network back to what it was."""
    before = _before(layout)
    if before is None:
        return
    sweep(layout, network)
    attempt(["ip", "address", "delete", f"{network.node_address}/32", "dev", "lo"])
    for name, value in before.settings.items():
        _setting(name).write_text(value)
    _delete_empty_tables(before.tables)
    _record(layout).unlink()


def sweep(layout: Layout, network: Network) -> None:
    """Remove what dead pods and a dead kube-proxy left behind."""
    before = _before(layout)
    if before is None:
        return  # nothing was ever started, so whatever is there is somebody else's
    for name in _namespaces():
        if name not in before.namespaces and _belongs_to_pods(name, network):
            run("ip", "netns", "delete", name)
    attempt(["ip", "link", "delete", network.bridge])
    for family in ("ip", "ip6"):
        attempt(["nft", "delete", "table", family, "kube-proxy"])
    for command in ("iptables", "ip6tables"):
        for table in ("nat", "filter", "mangle"):
            _delete_chains(command, table)


def tables() -> list[str]:
    """Return the packet filter's tables, each as family and name."""
    lines = attempt(["nft", "list", "tables"]).stdout.splitlines()
    return [line.removeprefix("table ") for line in lines]


def _record(layout: Layout) -> Path:
    return layout.root / "host-before.json"


def _before(layout: Layout) -> Before | None:
    record = _record(layout)
    return Before(**json.loads(record.read_text())) if record.exists() else None


def _delete_chains(command: str, table: str) -> None:
    """Delete the chains of the bridge plugins and the kubelet, and the rules that lead there."""
    rules = attempt([command, "-w", "-t", table, "-S"]).stdout.splitlines()
    ours = {chain for chain in map(_declared_chain, rules) if chain.startswith(("CNI-", "KUBE-"))}
    for rule in rules:
        words = rule.split()
        if words[0] == "-A" and words[1] not in ours and ours.intersection(words):
            # The rule as printed may quote a comment, which only a shell takes apart again.
            run("sh", "-c", f"{command} -w -t {table} -D {rule.removeprefix('-A ')}")
    for chain in ours:
        attempt([command, "-w", "-t", table, "-F", chain])
    for chain in ours:
        attempt([command, "-w", "-t", table, "-X", chain])


def _declared_chain(rule: str) -> str:
    return rule.removeprefix("-N ") if rule.startswith("-N ") else ""


def _delete_empty_tables(known: list[str]) -> None:
    for table in tables():
        if table in known:
            continue
        listing = attempt(["nft", "list", "table", *table.split()]).stdout
        lines = [line.strip() for line in listing.splitlines()]
        # Built-in chains without a rule are what iptables leaves; anybody's rule keeps the table.
        if all(
            line.startswith(("table ", "chain ", "type ")) or line in ("}", "") for line in lines
        ):
            attempt(["nft", "delete", "table", *table.split()])


def _namespaces() -> list[str]:
    return sorted(path.name for path in NETNS.glob("cni-*")) if NETNS.is_dir() else []


def _belongs_to_pods(namespace: str, network: Network) -> bool:
    listing = attempt(["ip", "-n", namespace, "-o", "-4", "address"]).stdout
    found = [line.split()[3] for line in listing.splitlines() if " lo " not in line]
    prefix = network.pod_range.rsplit(".", 1)[0] + "."
    # Without an address it is one that was just being made.
    return all(address.startswith(prefix) for address in found)


def _setting(name: str) -> Path:
    return SYSCTL / name


def _known(name: str) -> bool:
    return _setting(name).exists()
