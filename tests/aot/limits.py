"""What a compiled kernel may use, and what to do when it uses more. Imports nothing of triton."""

from typing import Any

# Shared memory that one block may ask for, bytes (CUDA programming guide, technical specifications).
SHARED_LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
# Kernels are written once for all: what a 4090 cannot hold is refused everywhere.
SHARED_LIMIT = min(SHARED_LIMITS.values())
REGISTER_LIMIT = 255  # a thread cannot have more; the compiler spills instead
REGISTERS_PER_BLOCK = 65_536  # and per multiprocessor
MAX_WARPS = 32


def problems(row: dict[str, Any], register_limits: dict[str, int] | None = None) -> list[str]:
    """Return what is wrong with one compiled kernel, each with its remedy; empty if nothing is.

    row: as `build.Result.row` makes it. register_limits: registers per thread by kernel, where fewer than 255 are
    wanted so that several blocks share a multiprocessor.
    """
    if row["error"]:
        return [f"does not compile: {row['error']}"]
    found = []
    wanted = (register_limits or {}).get(row["kernel"], REGISTER_LIMIT)
    if row["stack"]:
        found.append(
            f"spills {row['stack']} bytes per thread to local memory: take a smaller tile, more warps, or fewer stages"
        )
    if row["registers"] > wanted:
        found.append(f"{row['registers']} registers, more than {wanted}: take a smaller tile or more warps")
    # The hardware hands out registers to a warp in units of 256.
    held = -(-row["registers"] // 8) * 8 * 32 * row["warps"]
    if held > REGISTERS_PER_BLOCK:
        found.append(f"{row['warps']} warps hold {held} registers, more than {REGISTERS_PER_BLOCK}: no block can start")
    if row["warps"] > MAX_WARPS:
        found.append(f"{row['warps']} warps, more than {MAX_WARPS}")
    limit = SHARED_LIMITS[row["arch"]]
    if row["shared"] > limit:
        found.append(f"{row['shared']} bytes of shared memory, more than the {limit} of sm_{row['arch']}: {_SMALLER}")
    elif row["shared"] > SHARED_LIMIT:
        found.append(f"{row['shared']} bytes of shared memory, more than the {SHARED_LIMIT} of an RTX 4090: {_SMALLER}")
    if row["scratch"]:
        found.append(f"asks for {row['scratch']} bytes of global scratch memory: no allocator is set")
    if row["bad_grids"]:
        found.append(f"grids out of range (each at least 1, y and z at most 65535): {'; '.join(row['bad_grids'][:3])}")
    return found


_SMALLER = "take a smaller tile or fewer stages"


def severity(row: dict[str, Any]) -> tuple[int, ...]:
    """Order of badness: does not compile, spills, shared memory, registers."""
    return (bool(row["error"]), row["stack"] or 0, row["shared"] or 0, row["registers"] or 0)
