"""Peak memory, measured in processes of their own: a high-water mark never falls."""

from pathlib import Path


def high_water_mark() -> float:
    """Largest resident set of this process so far, in GB (1e9 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
