"""What must be true before anything on the machine is changed. Pure: facts in, sentences out."""

from dataclasses import dataclass

# What works where no container can run; every sentence about that ends with it.
INSTEAD = (
    "This machine still offers what works there: `mizzen serve` and `mizzen gateway` without a "
    "cluster, and `python3 -m hack.cluster api-up DIR` for the API alone."
)
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenPort:
    """A port that the cluster needs and somebody else listens on."""

    port: int
    purpose: str
    # Empty when it cannot be known.
    process: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was found on the machine."""

    is_root: bool
    has_go: bool
    is_built: bool
    missing_packages: tuple[str, ...]
    can_install: bool
    has_overlayfs: bool
    has_namespaces: bool
    missing_cgroups: tuple[str, ...]
    taken_ports: tuple[TakenPort, ...]
    free_bytes: int
    needed_gib: int
    disk: str


def find_problems(facts: Facts) -> list[str]:
    """Return one sentence for each thing that stands in the way; none means go."""
    if not facts.is_root:
        # Nothing else can be found out for certain without root.
        return [f"The cluster needs root to run containers: start it with sudo -E. {INSTEAD}"]
    problems = []
    if not facts.has_overlayfs:
        problems.append(
            "No overlay file system can be mounted here, so no container can run: use a machine "
            f"whose kernel has overlayfs, outside of an unprivileged container. {INSTEAD}"
        )
    if not facts.has_namespaces:
        problems.append(
            "No mount and network namespaces can be made here, so no container can run: use a "
            f"machine or a container that allows them. {INSTEAD}"
        )
    if facts.missing_cgroups:
        names = ", ".join(facts.missing_cgroups)
        problems.append(
            f"The control groups {names} are not mounted under /sys/fs/cgroup, so no container can "
            f"be limited: mount them. {INSTEAD}"
        )
    if facts.missing_packages and not facts.can_install:
        names = " ".join(facts.missing_packages)
        problems.append(
            f"These Debian packages are missing and there is no apt-get to install them: {names}. "
            f"Install containerd and the others by hand. {INSTEAD}"
        )
    if not facts.has_go and not facts.is_built:
        problems.append(
            "Go is missing: install Go 1.26 or newer and put `go` on the PATH, it builds the "
            "cluster's servers."
        )
    problems += [_port_sentence(taken) for taken in facts.taken_ports]
    if facts.free_bytes < facts.needed_gib * GIB:
        problems.append(full_disk_sentence(facts.disk, facts.free_bytes, facts.needed_gib))
    return problems


def full_disk_sentence(
    disk: str, free_bytes: int, needed_gib: int, *, who: str = "the cluster needs"
) -> str:
    """Say that a disk has too little room for the cluster or its images, and what to do."""
    return (
        f"The disk of {disk} has {free_bytes // GIB} GiB free and {who} "
        f"{needed_gib} GiB: free some, or point XDG_STATE_HOME and XDG_CACHE_HOME to a larger disk."
    )


def _port_sentence(taken: TakenPort) -> str:
    owner = f"by {taken.process}" if taken.process else "by another process"
    return (
        f"Port {taken.port}, which the cluster needs for {taken.purpose}, is taken {owner}: "
        "stop that process, or change the port in hack/cluster/pins.toml."
    )
