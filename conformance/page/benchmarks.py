"""How is a file of pytest-benchmark read? As one of `bench`: a row per contender, a shape per group."""

from __future__ import annotations

from typing import Any

OURS = {"op", "shape", "dtype", "backend"}  # extra_info of what `bench --benchmark-json` wrote is a row of the bench


def is_one(found: Any) -> bool:
    """Whether the JSON object is that of pytest-benchmark."""
    return isinstance(found, dict) and {"benchmarks", "machine_info"} <= found.keys()


def as_bench(found: dict[str, Any]) -> dict[str, Any]:
    """Convert it to {"meta", "results"}, which is then checked like a file of the judge.

    Raises:
        ValueError: a part is not what pytest-benchmark writes.
    """
    machine, commit, listed = (_object(found, "machine_info"), found.get("commit_info"), found["benchmarks"])
    if not isinstance(listed, list):
        raise ValueError("benchmarks: got no list")
    cpu = machine.get("cpu")
    brand = cpu.get("brand_raw") if isinstance(cpu, dict) else None
    versions = {name: machine[name] for name in ("torch", "triton", "cuda") if name in machine}
    meta = {
        "versions": {"python": machine.get("python_version"), **versions},
        "gpu": machine.get("gpu", brand),
        "driver": machine.get("driver"),
        "commit": commit.get("id") if isinstance(commit, dict) else None,
    }
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in listed:
        row = _row(one)
        rows.setdefault(tuple(str(row[name]) for name in sorted(OURS)), row)  # one per kind of time: all are the same
    return {"meta": meta, "results": list(rows.values())}


def _row(one: Any) -> dict[str, Any]:
    if not isinstance(one, dict):
        raise ValueError("benchmarks: got no object")
    extra = one.get("extra_info")
    if isinstance(extra, dict) and extra.keys() >= OURS:
        return extra
    stats, name = _object(one, "stats"), str(one.get("name"))
    missing = [key for key in ("q1", "median", "q3") if not isinstance(stats.get(key), (int, float))]
    if missing:
        raise ValueError(f"benchmark {name}: its stats have no number {missing[0]}")
    file, _, test = str(one.get("fullname", "")).partition("::")  # test with the class, if it has one
    full = [1e3 * stats[key] for key in ("q1", "median", "q3")]
    return {"op": file, "shape": one.get("group") or name, "dtype": "", "backend": test or name, "full": full}


def _object(found: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(found.get(key), dict):
        raise ValueError(f"{key}: got no object")
    return found[key]
