"""Faulty bundles: some made by hand, one for each known kind of fault, and any number made at random."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fraud.models.bundle import MANIFEST, canonical_json, preprocessor_digest, sha256

Change = Callable[[Path], None]
Mutator = Callable[[bytes, random.Random], bytes]
NASTY_NUMBERS = (
    *(b"0", b"-1", b"1", b"2147483647", b"2147483648", b"-2147483649", b"4294967296", b"9223372036854775808"),
    *(b"1e308", b"1e999", b"-1e999", b"nan", b"inf", b"1e-320", b"0x10", b"1_000", b"9" * 400, b"", b'"1"', b"null"),
)
INSERTED = (b"\r", b"\0", b"\x0b", b"\x85", b"\xff", b"\n", b" ", b"=", b"Tree=0\n", b"\xe2\x80\xa8", b"[" * 20_000)
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
SIGNED_SHARE = 0.8


@dataclass(frozen=True)
class Hostile:
    """A change to a good bundle that no bundle may carry."""

    name: str
    change: Change


def resign(folder: Path) -> None:
    """Recompute the manifest's digests from the current files, as an attacker with write access could."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_bytes())
    digests = {name: sha256((folder / name).read_bytes()) for name in manifest["files"] if (folder / name).is_file()}
    manifest["files"] |= digests
    manifest["features_digest"] = manifest["files"]["features.json"]
    manifest["preprocessor_digest"] = preprocessor_digest(manifest["files"])
    path.write_bytes(canonical_json(manifest))


def mutate(folder: Path, rng: random.Random) -> str:
    """Change a bundle's files at random, mostly with matching digests; return a description of the change."""
    names = sorted(path.name for path in folder.iterdir())
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice([*names, "booster.txt", "booster.txt", "features.json", "golden.jsonl"])
        if rng.random() < 0.07:
            other = rng.choice(names)
            contents = (folder / name).read_bytes(), (folder / other).read_bytes()
            (folder / other).write_bytes(contents[0])
            (folder / name).write_bytes(contents[1])
            done.append(f"{name} and {other} swapped")
            continue
        mutator = rng.choice(MUTATORS)
        (folder / name).write_bytes(mutator((folder / name).read_bytes(), rng))
        done.append(f"{name}: {mutator.__name__.removeprefix('_').replace('_', ' ')}")
    if rng.random() < SIGNED_SHARE:
        try:
            resign(folder)
            done.append("signed again")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            done.append("not to be signed")  # the manifest itself is what was broken
    return ", ".join(done)


def _bytes_flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _lines_doubled(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    return b"\n".join([*lines[: at + 1], *lines[at : at + rng.randint(1, 30)], *lines[at + 1 :]])


def _line_dropped(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    del lines[rng.randrange(len(lines))]
    return b"\n".join(lines)


def _lines_swapped(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return b"\n".join(lines)


def _number_replaced(content: bytes, rng: random.Random) -> bytes:
    found = list(NUMBER.finditer(content))
    if not found:
        return b"1"
    number, instead = rng.choice(found), rng.choice(NASTY_NUMBERS)
    return content[: number.start()] + instead + content[number.end() :]


def _number_of_a_field_replaced(content: bytes, rng: random.Random) -> bytes:
    """Replace a number right after a name: a size, mostly, which random numbers of a long array hide."""
    found = list(re.finditer(rb"[=:] ?(-?\d+)(?=[\s,])", content))
    if not found:
        return b"="
    number, instead = rng.choice(found), rng.choice(NASTY_NUMBERS)
    return content[: number.start(1)] + instead + content[number.end(1) :]


def _bytes_inserted(content: bytes, rng: random.Random) -> bytes:
    at = rng.randint(0, len(content))
    return content[:at] + rng.choice(INSERTED) + content[at:]


def _truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randint(0, len(content))]


MUTATORS: tuple[Mutator, ...] = (
    *(_bytes_flipped, _lines_doubled, _line_dropped, _lines_swapped, _number_replaced, _number_of_a_field_replaced),
    *(_bytes_inserted, _truncated),
)


def hostile_bundles() -> list[Hostile]:
    """Return the changes made by hand; applied to any good bundle, each must be refused."""
    return [Hostile(name, change) for name, change in _by_hand().items()]


def _by_hand() -> dict[str, Change]:
    def booster(pattern: str, instead: str) -> Change:
        return _signed("booster.txt", lambda text: re.sub(pattern, instead, text, count=1))

    def manifest(**more: object) -> Change:
        def change(folder: Path) -> None:
            path = folder / MANIFEST
            path.write_bytes(canonical_json(json.loads(path.read_bytes()) | more))

        return change

    def names_another_file(folder: Path) -> None:
        (folder / "more.txt").write_bytes(b"never looked at")
        path = folder / MANIFEST
        content = json.loads(path.read_bytes())
        content["files"]["more.txt"] = sha256(b"never looked at")
        path.write_bytes(canonical_json(content))

    def linked(name: str) -> Change:
        def change(folder: Path) -> None:
            shutil.move(folder / name, folder.parent / f"{folder.name}-{name}")
            (folder / name).symlink_to(folder.parent / f"{folder.name}-{name}")

        return change

    def piped(folder: Path) -> None:
        (folder / "booster.txt").unlink()
        os.mkfifo(folder / "booster.txt")

    def huge(name: str) -> Change:
        def change(folder: Path) -> None:
            with (folder / name).open("ab") as file:
                file.truncate(10 * 1024**3)  # sparse: no disk is used

        return change

    def a_folder(folder: Path) -> None:
        (folder / "policy.json").unlink()
        (folder / "policy.json").mkdir()

    return {
        "a carriage return inside a value": booster(r"(leaf_value=\S+) ", "\\1\rnum_leaves=999999 "),
        "a carriage return after a value": booster(r"(num_leaves=\d+)", "\\1\r"),
        "linear leaves of huge features": booster(
            "is_linear=0\n", "is_linear=1\nleaf_const=0\nnum_features=1\nleaf_features=99999999 \nleaf_coeff=1 \n"
        ),
        "a huge max_feature_idx": booster(r"max_feature_idx=\d+", "max_feature_idx=2000000000"),
        "a max_feature_idx beyond 64 bits": booster(r"max_feature_idx=\d+", "max_feature_idx=" + "9" * 30),
        "one feature more than in features.json": _signed("booster.txt", _one_feature_more),
        "a huge num_leaves": booster(r"num_leaves=\d+", "num_leaves=2147483647"),
        "a huge num_cat": booster(r"num_cat=\d+", "num_cat=2147483647"),
        "a huge num_class": booster(r"num_tree_per_iteration=\d+", "num_tree_per_iteration=2147483647"),
        "a child that is not there": booster(r"left_child=\S+", "left_child=2147483647"),
        "a child that is its parent": booster(r"left_child=\S+", "left_child=0"),
        "a line twice": booster(r"(\nnum_leaves=\d+)", r"\1\1"),
        "a field nobody knows": booster(r"\nnum_leaves", "\nnum_roots=1\nnum_leaves"),
        "a tree of ten thousand splits in a chain": _signed("booster.txt", _chain_of_splits),
        "text that is no UTF-8": _signed_bytes("booster.txt", lambda content: content + b"\xff\xfe"),
        "brackets without end": _signed_bytes("metrics.json", lambda _: b"[" * 500_000),
        "a calibrator that falls": _signed("calibrator.json", lambda _: '{"x": [0.0, 1.0], "y": [1.0, 0.0]}'),
        "no golden request": _signed("golden.jsonl", lambda _: ""),
        "a golden request of no features": _signed("golden.jsonl", _no_features),
        "a feature twice": _signed("features.json", _one_feature_twice),
        "another kind than the manifest's": _signed("features.json", _another_kind),
        "a further file in the manifest": names_another_file,
        "a name that leads out of the store": manifest(name="../../../evil"),
        "a name in capitals": manifest(name="FraudModel"),
        "a format of the future": manifest(format_version=99),
        "a linked manifest": linked(MANIFEST),
        "a linked booster": linked("booster.txt"),
        "a pipe for a file": piped,
        "a folder for a file": a_folder,
        "a model.yaml of 10 GB": huge("model.yaml"),
        "a manifest of 10 GB": huge(MANIFEST),
        "a booster of 10 GB": huge("booster.txt"),
    }


def _signed(name: str, edit: Callable[[str], str]) -> Change:
    return _signed_bytes(name, lambda content: edit(content.decode()).encode())


def _signed_bytes(name: str, edit: Callable[[bytes], bytes]) -> Change:
    """Change one file and sign the bundle again; for the booster the sizes of its trees are made right too."""

    def change(folder: Path) -> None:
        content = edit((folder / name).read_bytes())
        (folder / name).write_bytes(_resized(content) if name == "booster.txt" else content)
        resign(folder)

    return change


def _resized(content: bytes) -> bytes:
    body, end, rest = content.partition(b"\nend of trees")
    header, *trees = body.split(b"\nTree=")
    sizes = b" ".join(b"%d" % (len(tree) + len(b"\nTree=")) for tree in trees)
    header = re.sub(rb"tree_sizes=[^\n]*", b"tree_sizes=" + sizes, header)
    return b"\nTree=".join([header, *trees]) + end + rest


def _one_feature_more(text: str) -> str:
    highest = re.search(r"max_feature_idx=(\d+)", text)
    n = int(highest[1]) + 1 if highest else 0
    text = re.sub(r"max_feature_idx=\d+", f"max_feature_idx={n}", text)
    return re.sub(r"(feature_(?:names|infos)=[^\n]*)", r"\1 more", text)


def _no_features(text: str) -> str:
    return re.sub(r'"features":\[.*?\]', '"features":[]', text)


def _one_feature_twice(text: str) -> str:
    spec = json.loads(text)
    spec["features"][-1] |= {"name": spec["features"][-2]["name"]}
    return json.dumps(spec)


def _another_kind(text: str) -> str:
    spec = json.loads(text)
    spec["kind"] = "features" if spec["kind"] != "features" else "transaction"
    return json.dumps(spec)


def _chain_of_splits(text: str, n: int = 10_000) -> str:
    """Replace the first tree by one so deep that LightGBM's recursion would overflow, or take all memory."""

    def joined(values: range) -> str:
        return " ".join(map(str, values))

    zeros = " ".join(["0"] * n)
    tree = (
        f"\nTree=0\nnum_leaves={n + 1}\nnum_cat=0\nsplit_feature={zeros}\nthreshold={joined(range(n))}\n"
        f"decision_type={zeros}\nleft_child={joined(range(-1, -n - 1, -1))}\n"
        f"right_child={joined(range(1, n))} {-n - 1}\nleaf_value={zeros} 0\nleaf_count={' '.join(['1'] * (n + 1))}\n"
        f"internal_count={joined(range(n + 1, 1, -1))}\nis_linear=0\nshrinkage=1\n\n"
    )
    return re.sub(r"\nTree=0\n.*?\n\n(?=\nTree=1\n|\nend of trees)", lambda _: tree, text, count=1, flags=re.DOTALL)
