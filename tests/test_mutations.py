"""A thousand damaged or forged routers.

Each is refused in one line that names the file, and soon.
"""

import hashlib
import json
import os
import random
import shutil
import struct
import time

import pytest

from icrouting.config import EARLIER
from icrouting.icr import InContextRouter
from icrouting.routing import artifact

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SLOW = 5.0
HUGE = [0, -1, 2**31, 2**63, 10**400, -(10**400)]
NO_COUNT = [*HUGE, "3", 3.5, True, None, [], [3], {}, {"a": 3}, float("inf"), float("nan")]
NO_TEXT = [3, 3.5, True, None, [], ["a"], {}, {"a": "b"}]
# Every field whose change must be refused, and values that are none for it; one of the same kind
# that only says something else (another base model's name, more layers, other numbers of rows)
# nobody can tell from the truth.
FORGED = {
    "n_layers": [0, -1, 3, *NO_COUNT[6:]],
    **{name: NO_COUNT for name in ("n_heads", "n_kv_heads", "head_dim", "n_features")},
    **{name: NO_TEXT for name in ("base_model", "model_type", "fingerprint", "encoder", "rows")},
    **{name: [*NO_TEXT, "", "other"] for name in ("method", "site", "scale", "weights_sha256")},
    "format_version": [*NO_COUNT, 2],
    "layers": [
        [],
        [4, 3],
        [3, 3],
        [3, 99],
        [3],
        [2, 3],
        [-1, 4],
        ["3", "4"],
        [3.0, 4.0],
        [[3, 4]],
        "34",
        34,
        None,
        {},
    ],
    "tasks": [
        ["toy"],
        "toy",
        40,
        None,
        {"toy": "40"},
        {"toy": 40.5},
        {"toy": None},
        {"toy": [40]},
        {"toy": {"n": 40}},
    ],
    "versions": [
        ["torch"],
        "torch",
        2,
        None,
        {"torch": 2},
        {"torch": None},
        {"torch": ["2"]},
        {"torch": {}},
    ],
    "fit": ["fit", 3, None, [], {}, {"rank": 3}],
}
FORGED_FIT = {
    **{name: NO_COUNT for name in ("rank", "hidden_width")},
    **{
        name: [0, -1, -(10**400), *NO_COUNT[6:]]
        for name in (
            "n_prompts",
            "demos_per_class",
            "n_queries",
            "max_tokens",
            "batch_size",
            "epochs",
        )
    },
    **{name: [0, -1.0, 10**400, *NO_COUNT[6:7], *NO_COUNT[8:]] for name in ("lr", "grad_clip")},
    **{
        name: [10**400, -(10**400), *NO_COUNT[6:7], *NO_COUNT[8:]]
        for name in ("w_conf", "w_spar", "w_gate", "deepest_weight", "final_alpha_scale")
    },
    "seed": NO_COUNT[6:],
    "encoder": NO_TEXT,
    "basis": [*NO_TEXT, "", "fourier"],
    "ce_scope": [*NO_TEXT, "", "all"],
    "demo_selection": [*NO_TEXT, "", "far", 3],
    "pooling": [*NO_TEXT, "", "last-5", "mean", 4],
    "bias_rows": [*NO_TEXT, "", "first", 3],
    "extract_from": [*NO_TEXT, "", "few", 3],
    "layers": [[], [3], [4, 3], [3, 99], ["3", "4"], [3.0, 4.0], "34", 34, {}, True],
}


def sign(config):
    config["checksum"] = artifact._checksum(config)
    return json.dumps(config)


def rewritten(where, change):
    """The folder's configuration changed, its checksum right, as a careful forger would."""
    config = json.loads((where / CONFIG).read_text())
    change(config)
    (where / CONFIG).write_text(sign(config))


def reweighted(where, data):
    (where / WEIGHTS).write_bytes(data)
    rewritten(where, lambda config: config.update(weights_sha256=hashlib.sha256(data).hexdigest()))


def parts(data):
    """A safetensors file's header and what follows it."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def meaning(text):
    """What a header says; a field that the format does not know says nothing."""
    try:
        return {
            (name, field, str(value))
            for name, entry in json.loads(text).items()
            for field, value in entry.items()
            if field in ("dtype", "shape", "data_offsets")
        }
    except (ValueError, AttributeError):
        return None


def joined(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def forged_fields():
    def setter(name, value, of=None):
        return lambda where: rewritten(
            where, lambda config: (config[of] if of else config).update({name: value})
        )

    def dropper(name, of=None):
        return lambda where: rewritten(
            where, lambda config: (config[of] if of else config).pop(name)
        )

    for of, fields in ((None, FORGED), ("fit", FORGED_FIT)):
        for name, values in fields.items():
            # Files of earlier versions do without these.
            if name not in EARLIER:
                yield f"{of} without {name}", dropper(name, of)
            for value in values:
                yield f"{of} {name} = {value!r:.30}", setter(name, value, of)
        for name in ("colour", "", "\n", "\ud800"):
            yield f"{of} with {name!r}", setter(name, 3, of)


def texts():
    """What stands where a configuration should."""
    for depth in (*range(900, 1010, 10), 5000, 100_000):
        yield f"nested {depth}", lambda text, depth=depth: "[" * depth + "]" * depth
        yield (
            f"nested object {depth}",
            lambda text, d=depth: '{"method":"icr","format_version":1,"a":' * d + "1" + "}" * d,
        )
        yield (
            f"nested field {depth}",
            lambda text, d=depth: text.replace(
                '"base_model": "', '"base_model": ' + "[" * d + "]" * d + ', "x": "', 1
            ),
        )
    for word in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "1" * 5000,
        "nul",
        "'3'",
        "0x3",
        "+3",
        "03",
    ):
        yield (
            f"literal {word:.9}",
            lambda text, word=word: text.replace('"rank": 3', f'"rank": {word}'),
        )
    for name in (
        "format_version",
        "n_heads",
        "layers",
        "fit",
        "checksum",
        "weights_sha256",
        "rank",
    ):
        yield (
            f"twice {name}",
            lambda text, n=name: text.replace(f'"{n}": ', f'"{n}": 0, "{n}": ', 1),
        )
    for content in (
        "",
        " ",
        "\n",
        "null",
        "true",
        "3",
        '"icr"',
        "[]",
        "{}",
        "[{}]",
        "\ufeff{}",
        "\x00",
        "{",
        "}",
        '{"a"}',
    ):
        yield f"only {content!r}", lambda text, content=content: content


def headers(header, body):
    """Forged weights: dtypes, shapes, offsets, names."""
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        entry = header[name]
        for dtype in (
            "F64",
            "F16",
            "BF16",
            "I32",
            "U32",
            "U8",
            "BOOL",
            "F8_E4M3",
            "F8_E8M0",
            "F4",
            "C64",
            "X",
            "",
            3,
            None,
        ):
            yield f"{name} as {dtype}", joined(header | {name: entry | {"dtype": dtype}}, body)
        size = entry["shape"]
        for shape in (
            [],
            [*size[::-1], 1],
            [-1],
            [0],
            [2**62, 4],
            [*size, 1],
            [1, *size],
            "3",
            None,
            [3.5],
            [2**64],
        ):
            yield f"{name} shaped {shape}", joined(header | {name: entry | {"shape": shape}}, body)
        start, stop = entry["data_offsets"]
        for offsets in (
            [stop, start],
            [start, stop + 4],
            [start + 4, stop],
            [0, 2**63],
            [-4, stop],
            [0],
            None,
            [0, 2**64],
        ):
            yield (
                f"{name} at {offsets}",
                joined(header | {name: entry | {"data_offsets": offsets}}, body),
            )
        yield f"without {name}", joined({n: e for n, e in header.items() if n != name}, body)
        yield (
            f"{name} renamed",
            joined({n + "\n" * (n == name): e for n, e in header.items()}, body),
        )
        for value in ("nan", "inf", "-inf"):
            yield (
                f"{value} in {name}",
                joined(header, body[:start] + struct.pack("<f", float(value)) + body[start + 4 :]),
            )
        if name.endswith("_std"):
            for value in (0.0, -1.0):
                yield (
                    f"{value} in {name}",
                    joined(header, body[:start] + struct.pack("<f", value) + body[start + 4 :]),
                )
    extra = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    for name in ("pids.more", "router.alpha.4.weight", "more\nlines", "", "__metadata__"):
        yield f"one more, {name!r}", joined(header | {name: extra}, body + bytes(4))
    for n_bytes in (0, 1, 7, 8, 9, 2**20, 2**31, 2**62, 2**63, 2**64 - 1):
        yield (
            f"header of {n_bytes}",
            struct.pack("<Q", n_bytes) + json.dumps(header).encode() + body,
        )
    for text in (
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff" * 9,
        b'{"a":1}',
        b"[" * 5000,
        b'{"a":{"dtype":"F32"}}',
        b"{" * 99999,
    ):
        yield f"header {text[:9]}", joined(text, body)


def places(where):
    """What lies where the files should.

    Everything that is no file of its own is refused, also what would block.
    """
    for name in (CONFIG, WEIGHTS):
        file = where / name
        yield f"no {name}", file.unlink
        yield f"{name} is a folder", lambda file=file: (file.unlink(), file.mkdir())
        yield f"{name} leads nowhere", lambda file=file: (file.unlink(), file.symlink_to("nowhere"))
        yield (
            f"{name} leads to itself",
            lambda file=file: (file.unlink(), file.symlink_to(file.name)),
        )
        yield f"{name} is a pipe", lambda file=file: (file.unlink(), os.mkfifo(file))
        yield f"{name} is a device", lambda file=file: (file.unlink(), file.symlink_to("/dev/zero"))
        yield (
            f"{name} is a folder elsewhere",
            lambda file=file: (file.unlink(), file.symlink_to(file.parent.parent)),
        )
        other = where / (WEIGHTS if name == CONFIG else CONFIG)
        yield f"{name} is the other file", lambda file=file, other=other: shutil.copy(other, file)


def damaged(whole, rng):
    """A file with one bit flipped, a byte changed, a part cut out, cut off, doubled or zeroed."""
    data, at = bytearray(whole), rng.randrange(len(whole))
    match rng.randrange(5):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            del data[at : at + rng.randrange(1, 40)]
        case 2:
            del data[at:]
        case 3:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        case 4:
            data[at] = rng.choice([byte for byte in range(256) if byte != data[at]])
    return bytes(data)


def says_the_same(version, whole):
    """Whether a configuration lost, or got, nothing but space between its words."""
    try:
        return json.loads(version) == json.loads(whole)
    except ValueError:
        return False


@pytest.fixture
def where(saved_router, tmp_path):
    return shutil.copytree(saved_router, tmp_path / "router")


def refusal(where):
    """What is said on loading.

    Fails unless it is one line that names a file of the folder, and soon.
    """
    started = time.perf_counter()
    try:
        InContextRouter.from_pretrained(where)
    except (ValueError, OSError) as error:
        said = str(error)
    else:
        return "accepted"
    took = time.perf_counter() - started
    if took > SLOW:
        return f"took {took:.1f} s"
    is_named = CONFIG in said or WEIGHTS in said
    return (
        None
        if is_named and str(where) in said and len(said.splitlines()) == 1
        else f"said {said!r:.200}"
    )


def check(where, cases):
    """Applies each change to a fresh copy; all failures are shown at once."""
    whole, failures, n_cases = (
        {name: (where / name).read_bytes() for name in (CONFIG, WEIGHTS)},
        [],
        0,
    )
    for case, change in cases:
        shutil.rmtree(where)
        where.mkdir()
        for name, data in whole.items():
            (where / name).write_bytes(data)
        change()
        n_cases += 1
        try:
            wrong = refusal(where)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error!s:.100}"
        failures += [f"{case}: {wrong}"] if wrong else []
    assert not failures, f"{len(failures)} of {n_cases}:\n" + "\n".join(failures[:60])
    return n_cases


@pytest.mark.slow
def test_files_that_were_damaged_are_refused(where):
    rng, cases = random.Random(0), []
    for name in (CONFIG, WEIGHTS):
        whole = (where / name).read_bytes()
        versions = {damaged(whole, rng) for _ in range(150)} - {whole}
        versions = {version for version in versions if not says_the_same(version, whole)}
        cases += [
            (f"{name} {number}", lambda name=name, data=data: (where / name).write_bytes(data))
            for number, data in enumerate(sorted(versions))
        ]
    assert check(where, cases) > 280


def test_what_is_no_file_is_refused(where):
    check(where, places(where))


def test_what_is_no_configuration_is_refused(where):
    text = (where / CONFIG).read_text()
    check(
        where,
        (
            (case, lambda make=make: (where / CONFIG).write_text(make(text)))
            for case, make in texts()
        ),
    )


@pytest.mark.slow
def test_forged_fields_with_right_checksums_are_refused(where):
    assert (
        check(
            where, ((case, lambda change=change: change(where)) for case, change in forged_fields())
        )
        > 400
    )


@pytest.mark.slow
def test_forged_weights_with_right_checksums_are_refused(where):
    cases = headers(*parts((where / WEIGHTS).read_bytes()))
    assert (
        check(where, ((case, lambda data=data: reweighted(where, data)) for case, data in cases))
        > 500
    )


@pytest.mark.slow
def test_damaged_headers_with_right_checksums_are_refused(where):
    """Bits of the header alone.

    In the body they make another router, which nobody can tell from the right one.
    """
    data = (where / WEIGHTS).read_bytes()
    (n_bytes,), rng = struct.unpack("<Q", data[:8]), random.Random(1)
    versions = []
    for _ in range(200):
        text = damaged(data[8 : 8 + n_bytes], rng)
        versions += (
            []
            if meaning(text) == meaning(data[8 : 8 + n_bytes])
            else [joined(text, data[8 + n_bytes :])]
        )
    check(
        where, ((f"header {n}", lambda d=d: reweighted(where, d)) for n, d in enumerate(versions))
    )
