"""Tables in Markdown from results files: what each benchmark found, as the documents quote it.

A maker takes the facts of one file or of several, in the order of the marker, and the words behind the table's name;
it returns Markdown. benchmarks/tables.py puts what they make into the documents.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Facts = Mapping[str, Any]  # a results file
ALTERNATIVES = (0.35, 0.5, 0.75, 1.0)  # budgets beside other networks
THIN = ("pole", "sign symbol", "pedestrian", "bicyclist")  # classes of CamVid that a short training loses


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def how(facts: Sequence[Facts], words: str) -> str:
    """Where and when the first of the files was measured, with which versions."""
    machine, first = facts[0]["machine"], facts[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    threads = first.get("threads", machine["threads"])
    return f"{machine['gpu'] or machine['cpu']}, {threads} {_plural('thread', threads)}; {first['date']}; {versions}."


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"


def comparison(facts: Sequence[Facts], words: str) -> str:
    """The paper's Table 1 as benchmarks/table1.py found it, and below it a note on how it was made."""
    (found,) = facts
    head = ["network", "seeds", "mIoU, %", "dynamic at equal cost", "real cost, GMACs: mean / max / min"]
    head += ["parameters, M", "paper: mIoU", "GMACs", "M"]
    rows = []
    for row in found["rows"]:
        std, cost, paper = row["miou_std"], row["gmacs"], row["paper"]
        miou = f"{100 * row['miou_mean']:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")
        constant = cost["max"] - cost["min"] < 1e-9 * cost["max"]
        gmacs = " / ".join(f"{cost[key]:.3f}" for key in (("mean",) if constant else ("mean", "max", "min")))
        theirs = ["", "", ""]
        if paper:
            paper_gmacs = " / ".join(f"{value:.1f}" for value in paper["gmacs"].values())
            theirs = [f"{100 * paper['miou']:.1f}", paper_gmacs, f"{paper['params_m']:.1f}"]
        other = row["dynamic_at_equal_cost"]
        difference = "" if other is None else f"{100 * other:.1f} ({100 * (other - row['miou_mean']):+.1f})"
        rows.append([row["label"], str(len(row["seeds"])), miou, difference, gmacs, f"{row['params_m']:.2f}", *theirs])
    data, recipe = found["settings"]["data"], found["settings"]["recipe"]
    images = found["rows"][0]["runs"][0]["images"] if found["rows"] else 0
    crop, seeds = "x".join(map(str, data["crop"])), ", ".join(map(str, found["seeds"]))
    parts = [
        table(head, rows),
        f"{data['name']}, {images} validation images; {recipe['iterations']} iterations of {data['batch_size']} "
        f"crops of {crop}, the same recipe for all; seeds {seeds}, mean ± standard deviation over them. "
        f"The paper's columns: Cityscapes at 1024x2048, its Table 1. {how(facts, '')}",
    ]
    if found["missing"]:
        parts.append(f"Missing: {', '.join(found['missing'])}.")
    return "\n\n".join(parts)


def any_budget(facts: Sequence[Facts], words: str) -> str:
    """One network asked for several budgets, as benchmarks/any_budget.py found it, and below it how it was made."""
    (found,) = facts
    head = ["asked, % of the full network", "spent (on held-out images)", "mIoU, %"]
    head += ["best static network of no more cost", "- shuffled", "- common", "oracle - shuffled"]
    head += ["cheapest to dearest image", "rank correlation with object size (p)"]
    rows = []
    for row in found["rows"]:
        best, own = row["best_static"], 100 * row["own"]
        std = "" if row["own_std"] is None else f" ± {100 * row['own_std']:.1f}"
        static = "" if best is None else f"{best['name']}, {100 * best['miou']:.1f} ({own - 100 * best['miou']:+.1f})"
        differences = [(row["own"], row["shuffled"]), (row["own"], row["common"]), (row["oracle"], row["shuffled"])]
        elsewhere = "" if row["held_out"] is None else f" ({100 * row['held_out']:.1f})"
        rows.append(
            [f"{100 * row['asked']:.4g}", f"{100 * row['spent']:.1f}{elsewhere}", f"{own:.1f}{std}", static]
            + [f"{100 * (a - b):+.1f}" for a, b in differences]
            + [f"{100 * row['least']:.0f} to {100 * row['most']:.0f}"]
            + [f"{row['size_correlation']:+.2f} ({row['size_chance']:.1g})"]
        )
    data, recipe = found["settings"]["data"], found["settings"]["recipe"]
    crop, seeds = "x".join(map(str, data["crop"])), ", ".join(map(str, found["seeds"]))
    return (
        table(head, rows) + f"\n\n{data['name']}, {found['pictures']} validation images; {recipe['iterations']} "
        f"iterations of {data['batch_size']} crops of {crop}, the same recipe for all; the full network has "
        f"{1000 * found['full_gmacs']:.0f} MMACs; seeds {seeds}, mean ± standard deviation over them, of p the "
        f"largest. {how(facts, '')}"
    )


def scores(facts: Sequence[Facts], words: str) -> str:
    """A row for each evaluation; `words` are their names, separated by semicolons."""
    rows = []
    for name, found in zip(words.split(";"), facts, strict=True):
        cost = found["cost_gmacs"]
        cells = [f"{100 * found['miou']:.1f}", f"{100 * found['majority_class_miou']:.1f}"]
        cells.append(" / ".join(f"{cost[key]:.3f}" for key in ("mean", "min", "max")))
        rows.append([name.strip(), *cells, f"{cost['full']:.3f}", f"{100 * cost['mean_share']:.0f}"])
    head = ["", "mIoU, %", "mIoU of the most frequent class alone, %", "real cost, GMACs: mean / min / max"]
    return table([*head, "all open", "real cost, % of that"], rows)


def classes(facts: Sequence[Facts], words: str) -> str:
    """IoU of each class in several evaluations; `words` names them, with a semicolon between."""
    names = [name.strip() for name in words.split(";")]
    rows = [[name, *(_share(one["iou"][name]) for one in facts)] for name in facts[0]["iou"]]
    rows.append(["**mean**", *(f"**{_share(one['miou'])}**" for one in facts)])
    rows.append(["real cost, GMACs", *(f"{one['cost_gmacs']['mean']:.3f}" for one in facts)])
    return table(["IoU, %", *names], rows)


def trials(facts: Sequence[Facts], words: str) -> str:
    """One change of a recipe after the other: what is different, and the score of it."""
    (found,) = facts
    rows = []
    for row in found["rows"]:
        changes = {key: value for part in row["changes"].values() for key, value in part.items()}
        said = ", ".join(f"{key} {value}" for key, value in changes.items()) or "none"
        iou = row["runs"][0]["iou"]
        rows.append([row["name"], said, _share(row["miou_mean"]), *(_share(iou[name]) for name in THIN)])
    recipe = found["settings"]["recipe"]
    note = f"{recipe['iterations']} iterations, seeds {', '.join(map(str, found['seeds']))}. {how(facts, '')}"
    return f"{table(['trial', 'changes', 'mIoU, %', *THIN], rows)}\n\n{note}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def architectures(facts: Sequence[Facts], words: str) -> str:
    """The fit of benchmarks/fit_architectures.py."""
    names = {"fcn-32s": "FCN-32s", "deeplabv3": "DeepLabV3", "u-net": "U-Net", "hrnetv2": "HRNetV2"}
    names["auto-deeplab"] = "Auto-DeepLab"
    rows = []
    for name, found in facts[0]["architectures"].items():
        gated, static = found["with_gates"], found["static"]
        ours, bare = gated["ours"], static["ours"]
        cells = [f"{found['paper_gmacs']:.1f}", f"{ours['gmacs']:.2f}", f"{100 * ours['gmacs_off']:+.1f} %"]
        cells += [f"{found['paper_params_m']:.1f}", f"{ours['params_m']:.2f}", f"{100 * ours['params_off']:+.1f} %"]
        cells += [f"{found[key]['within_5_percent']} of {found['patterns']}" for key in ("with_gates", "static")]
        rows.append([names[name], *cells, f"{bare['gmacs']:.2f}", f"{bare['params_m']:.2f}"])
    head = ["", "GMACs, Table 1", "with gates", "", "parameters, M, Table 1", "with gates", ""]
    head += ["patterns within 5 %, with gates", "without", "ours, static: GMACs", "parameters, M"]
    return table(head, rows)


def int8(facts: Sequence[Facts], words: str) -> str:
    """Files of benchmarks/int8.py: a network with gates on CamVid, then those of full size."""
    (found,) = facts
    rows = [
        [row["file"], f"{row['mb']:.1f}", f"{100 * row['miou']:.2f} %", f"{100 * row['same_labels']:.1f} %"]
        + [f"{row['median_ms']:.1f}"]
        for row in found["camvid"]
    ]
    for row in found["full_size"]["results"]:
        name = f"full size (depth 16, 64 channels, static, 512x1024), {row['file']}"
        rows.append([name, f"{row['mb']:.1f}", "", "", f"{row['median_ms']:.0f}"])
    return table(["file", "MB", "mIoU", "labels as float32", "ms an image"], rows)


def exits_file(facts: Sequence[Facts], words: str) -> str:
    """Files with exits of benchmarks/int8.py --exits: scores at each budget, beside those of the checkpoint."""
    (found,) = facts
    rows = [
        [row["budget"], row["file"], f"{100 * row['miou']:.1f} %", f"{100 * row['share']:.1f} %"]
        + [f"{100 * row['same_labels']:.1f} %", f"{100 * row['same_exits']:.0f} %"]
        for row in found["scores"]
    ]
    return table(["budget", "", "mIoU", "cost", "labels as the checkpoint's", "exits as the checkpoint's"], rows)


def exits_times(facts: Sequence[Facts], words: str) -> str:
    """The same: milliseconds of files with exits, and of static ones that end at the same exit."""
    (found,) = facts
    times = {tuple(name.rsplit(", ", 2)): row["median_ms"] for name, row in found["times"].items()}
    rows = []
    for kind, runtime in dict.fromkeys(name[1:] for name in times):
        exits = [name.removeprefix("static ") for name, *rest in times if rest == [kind, runtime] and "static" in name]
        cells = [
            f"{times[what, kind, runtime]:.0f}" for e in exits for what in (f"static {e}", f"exits, leaves at {e}")
        ]
        rows.append([f"{runtime}, {kind}", *cells])
    return table(["ms an image", "whole network, static", "with exits", "first exit, static", "with exits"], rows)


def workers(facts: Sequence[Facts], words: str) -> str:
    """Images a second of benchmarks/prediction.py: a row with images and one without."""
    (found,) = facts
    rates = {(row["way"], row["workers"], row["pictures"]): row["images_per_s"] for row in found["results"]}
    ways = list(dict.fromkeys((row["way"], row["workers"]) for row in found["results"]))
    names = {True: "with overlays and drawings of the route", False: "labels and JSON only (`--pictures false`)"}
    rows = [[name, *(f"{rates[*way, kind]:.1f}" for way in ways)] for kind, name in names.items()]
    known = {"plain": "one process", "50%": "`--budget 50%`", "onnx": "ONNX Runtime"}
    in_words = [known[way] if n is None else f"Ray, {n} {_plural('worker', n)}" for way, n in ways]
    return table(["images a second", *in_words], rows)


def serving(facts: Sequence[Facts], words: str) -> str:
    """Images a second of benchmarks/serving.py by the number of clients, and their milliseconds."""
    (found,) = facts
    rows = [row for row in found["rows"] if "clients" in row]
    cells = {
        (row["server"], row["budget"], row["clients"]): f"{row['images_per_s']:.1f} "
        f"({row['p50_ms']:.0f} / {row['p99_ms']:.0f})"
        for row in rows
    }
    clients = sorted({row["clients"] for row in rows})
    kinds = dict.fromkeys((row["server"], row["budget"]) for row in rows)
    head = [f"{number} {_plural('client', number)}" for number in clients]
    return table(
        ["server", "budget", *head], [[*kind, *(cells[*kind, number] for number in clients)] for kind in kinds]
    )


def overload(facts: Sequence[Facts], words: str) -> str:
    """What became of more requests than the servers of benchmarks/serving.py can answer."""
    rows = [
        [
            row["server"],
            f"{row['offered_per_s']:.1f}",
            f"{row['images_per_s']:.1f}",
            f"{100 * row['refused']:.0f}",
            f"{row['p50_ms']:.0f} / {row['p99_ms']:.0f}",
            f"{row['lost']}, {row['wrong']}",
        ]
        for row in facts[0]["rows"]
        if "offered_per_s" in row
    ]
    head = ["server", "requests a second", "images a second", "refused (503), %", "ms: p50 / p99", "lost, wrong"]
    return table(head, rows)


def video(facts: Sequence[Facts], words: str) -> str:
    """A frame time that is to hold while a load comes and goes, as benchmarks/video.py found it."""
    (found,) = facts
    names = {"paced": "`--frame_ms {:.0f}`", "fixed": "a budget of the same mean cost", "whole": "the whole network"}
    names["cheapest"] = "the cheapest exit"
    rows = []
    for target in found["pace"]["targets"]:
        asked = f"{target['asked_ms']:.0f} ms ({target['asked_fps']:.1f} fps)"
        for way, row in target["ways"].items():
            cells = [f"{row['p95_ms']:.0f}", f"{100 * row['late']:.1f}", f"{1000 / row['mean_ms']:.1f}"]
            cells += [f"{100 * row['share']:.0f}", f"{100 * row['miou']:.1f}"]
            rows.append([asked if way == "paced" else "", names[way].format(target["asked_ms"]), *cells])
    head = ["asked", "", "95th percentile, ms", "late frames, %", "frames a second", "mean cost, %", "mIoU, %"]
    return table(head, rows)


def loaders(facts: Sequence[Facts], words: str) -> str:
    """Images a second of the loader in benchmarks/data.py."""
    rates = {(row["workers"], row["cache"]): row["images_per_s"] for row in facts[0]["loaders"]}
    rows = [[str(n), f"{rates[n, False]:.1f}", f"{rates[n, True]:.1f}"] for n in sorted({n for n, _ in rates})]
    return table(["loader workers", "images a second", "with the cache"], rows)


def stages(facts: Sequence[Facts], words: str) -> str:
    """Milliseconds of an item's parts in benchmarks/data.py."""
    rows = [[row["stage"], f"{row['ms']:.1f}"] for row in facts[0]["stages"]]
    return table(["stage", "ms, median"], rows)


def steps(facts: Sequence[Facts], words: str) -> str:
    """Seconds of a training step in benchmarks/training.py: PyTorch's operations and ours, and what is gained."""
    found: dict[tuple, dict[str, float]] = {}
    for row in facts[0]["results"]:
        images = f"{row['batch']} x {row['size'][0]}x{row['size'][1]}"
        setting = (row.get("kind", "gates"), row["depth"], row["channels"], images)
        found.setdefault(setting, {})["ours" if row["ours"] else row["precision"]] = row["step_s"]
    rows = [
        [*map(str, setting), *(f"{times[way]:.3f}" if way in times else "" for way in ("fp32", "bf16", "ours"))]
        + [f"{times['fp32'] / times['ours']:.2f}"]
        for setting, times in found.items()
    ]
    head = ["network", "depth", "channels", "images", "PyTorch, s", "in bfloat16", "our kernels, s", "times as fast"]
    return table(head, rows)


def trainings(facts: Sequence[Facts], words: str) -> str:
    """Two trainings of benchmarks/training.py --camvid, that of PyTorch's operations first."""
    rows = []
    for way, name in (("pytorch", "PyTorch's operations"), ("ours", "our kernels")):
        found = facts[0][way]
        last = found["losses"][-20:]
        losses = [f"{found['losses'][step - 1]:.4f}" for step in (1, 10)] + [f"{sum(last) / len(last):.3f}"]
        rows.append([name, *losses, f"{100 * found['miou']:.1f} %", f"{found['seconds']:.0f}"])
    head = ["", "loss of step 1", "of step 10", "mean of the last 20", "mIoU", "seconds with validation"]
    return table(head, rows)


def needed(facts: Sequence[Facts], words: str) -> str:
    """Images a second that a training step takes, by what the machine sustains."""
    found = facts[0]["needed"]["images_per_s_at_sustained_tflops"]
    return table(["sustained TFLOP/s", "images a second"], [[tflops, f"{rate:.0f}"] for tflops, rate in found.items()])


def explorer(facts: Sequence[Facts], words: str) -> str:
    """How often the explorer answers while the budget is dragged."""
    (found,) = facts
    return (
        f"{found['answers_per_second']:.1f} answers a second, of which the network takes "
        f"{found['network_ms_median']:.0f} ms each (median); {found['answers_after_the_last_move']} came after the "
        f"last move. {how(facts, words)}"
    )


def busy(facts: Sequence[Facts], words: str) -> str:
    """Work beside other work: PyTorch's threads spinning or asleep while they wait for each other."""
    (found,) = facts
    names = {
        "training": "a training step of PyTorch's operations",
        "training_kernels": "a training step on the kernels",
        "forward": "a forward of PyTorch's operations",
    }
    names |= {f"small_{work}": f"{name}, small" for work, name in names.items()}
    head = ["steps a second, spinning / asleep", "idle machine", "one of two cores busy"]
    cells = {
        machine: {
            work: f"{one['spinning']:.3g} / {one['asleep']:.3g} ({one['ratio']:.3g}x)" for work, one in rows.items()
        }
        for machine, rows in found["steps_per_second"].items()
    }
    rows = [[name, cells["idle"][work], cells["one_core_busy"][work]] for work, name in names.items()]
    return table(head, rows)


def places(facts: Sequence[Facts], words: str) -> str:
    """`chosen`: what choosing is worth, of one file. `follows`: whether cost follows what is in images. `kept`: what
    budgets cost on other sources. `frontier`: what budgets bring, or some of them (`frontier 30 50`, in percent),
    beside smaller images of the same cost. `closer`: two looks beside places of one look and smaller images. `walked:
    NAME, NAME`: the scores of networks at shares of the cost, between those that were measured, with places and with
    smaller images.
    """
    if words.startswith("frontier"):
        some = {float(one) / 100 for one in words.split()[1:]}
        rows = [
            [
                f"`--budget {100 * row['asked']:.0f}%`",
                _sides(row["size"]),
                _share(row["cost"]),
                _share(row["miou"]),
                *_at_shares(facts[0]["sizes"], [row["cost"]]),
            ]
            for row in facts[0]["frontier"]
            if not some or row["asked"] in some
        ]
        return table(["", "times the sides", "spent, %", "mIoU, %", "a smaller or larger image, all layers"], rows)
    if words == "follows":
        rows = []
        for one in facts:
            found = one["follows"]
            cells = [
                f"{found[name]['correlation']:+.2f} ({found[name]['chance']:.1g})"
                for name in ("size_of_things", "borders")
            ]
            span = f"{_share(min(found['costs']))} to {_share(max(found['costs']))} %"
            name = {"bundled": "camvid"}.get(one["network"], one["network"])
            rows.append([f"`{name}`, {one['images']} images", *cells, span])
        return table(["", "size of things", "length of borders", "cheapest to dearest"], rows)
    if words == "kept":
        rows = []
        for source, found in facts[0]["kept"].items():
            cells = [
                f"{_share(one['mean'])} ({_share(one['fixed'])}); {_share(one['per_image'])} "
                f"(± {_share(one['per_image_furthest'])})"
                for one in found.values()
            ]
            rows.append([source, *cells])
        asked = next(iter(facts[0]["kept"].values()))
        return table(["spent, % of", *(f"{100 * float(one):.0f} %" for one in asked)], rows)
    if words == "chosen":
        ways = ("images", "places", "shuffled", "exchanged", "common", "oracle")
        ways = tuple(way for way in ways if way in next(iter(facts[0]["chosen"].values())))
        rows = [
            [f"{100 * float(asked):.0f}", *(_share(found[way]) for way in ways)]
            for asked, found in facts[0]["chosen"].items()
        ]
        return table(["share of the cost, %", *ways], rows)
    if words == "closer":
        shares = (0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8)
        one = facts[0]
        ways = {"a smaller image, all layers": one["sizes"]}
        for size in sorted({row["size"] for row in one["walked"]}):
            ways[f"places leave, times the sides: {size:g}"] = [row for row in one["walked"] if row["size"] == size]
        for pair in sorted({tuple(row["size"]) for row in one["closer"]}):
            ways[f"two looks: {_sides(list(pair))}"] = [row for row in one["closer"] if tuple(row["size"]) == pair]
        rows = [[way, *_at_shares(points, shares)] for way, points in ways.items()]
        return table(["mIoU, % at a share of the cost of", *(f"{100 * share:.0f} %" for share in shares)], rows)
    shares, rows = (0.27, 0.3, 0.35, 0.5, 0.65, 0.8, 1.0), []
    names = [name.strip() for name in words.removeprefix("walked:").split(",")]
    for name, one in zip(names, facts, strict=True):
        ways = {}
        for size in sorted({row["size"] for row in one["walked"]}):
            whole = [row for row in one["sizes"] if row["size"] == size]
            at = "" if size == 1 else f", {size:g} of the sides"
            ways[f"places of {one['place']}{at}"] = [row for row in one["walked"] if row["size"] == size] + whole
        ways["smaller images"] = one["sizes"]
        for way, points in ways.items():
            rows.append([f"{name}: {way}", *_at_shares([row for row in points if row["cost"] <= 1], shares)])
    return table(["mIoU, % at a share of the cost of", *(f"{100 * share:.0f} %" for share in shares)], rows)


def _at_shares(points: Sequence[Any], shares: Sequence[float]) -> list[str]:
    """The scores at shares of the cost, between points that were measured."""
    points = sorted(points, key=lambda row: row["cost"])
    costs, scores = [row["cost"] for row in points], [row["miou"] for row in points]
    return [_share(_between(share, costs, scores)) for share in shares]


def _sides(size: Any) -> str:
    """A size, or two, in words."""
    return " and ".join(f"{one:g}" for one in size) if isinstance(size, list) else f"{size:g}"


def clock(facts: Sequence[Facts], words: str) -> str:
    """`budgets`: milliseconds of budgets at each size, in bfloat16 too where it was measured. `places`: what share of
    the time a share of the MACs takes."""
    sizes = facts[0]["sizes"]
    known = next(iter(sizes.values()))
    if words == "places":
        ways = [way for way in known if way.startswith("places")]
        rows = [
            [size, *(f"{_share(found[way]['share_of_macs'])} -> {_share(found[way]['of_full'])}" for way in ways)]
            for size, found in sizes.items()
        ]
        return table(["% of the MACs -> % of the time", *("" for _ in ways)], rows)
    ways = {f"`--budget {way.split()[1]}`": way for way in known if way.startswith("budget") and "bf" not in way}
    ways |= {"full network": "full", "full network, ONNX Runtime": "onnx"}

    def cell(found: Any, way: str) -> str:
        other = found.get(f"{way} bfloat16")
        return f"{found[way]['ms']:.0f}" + ("" if other is None else f" ({other['ms']:.0f})")

    rows = [[name, *(cell(found, way) for found in sizes.values())] for name, way in ways.items()]
    return table(["ms" + (" (in bfloat16)" if "full bfloat16" in known else ""), *sizes], rows)


def equal_time(facts: Sequence[Facts], words: str) -> str:
    """What a network, the first or the one that is named, makes of budgets, beside all of its layers on a smaller
    image, and the best static network and size of no more cost."""
    rows, known = [], facts[0]["rows"]
    for row in known[words.strip() or next(iter(known))]:
        static, alone = row["static"], row["sizes_alone"]
        rows.append(
            [
                f"{100 * row['asked']:.0f} %",
                _share(row["cost"]),
                f"**{_share(row['miou'])}**",
                "" if alone is None else f"{_share(alone['miou'])} ({alone['size']:g})",
                "" if static is None else f"{_share(static['miou'])} ({static['name']}, {static['size']:g})",
            ]
        )
    head = [
        "budget",
        "spent, %",
        "any budget",
        "all of its layers (times the sides)",
        "best static network (times the sides)",
    ]
    return table(head, rows)


def alternatives(facts: Sequence[Facts], words: str) -> str:
    """Networks that were trained for the same time (benchmarks/equal_time.py), their scores over the seeds at the
    images' own size and at the best one, beside the milliseconds of benchmarks/clock.py at 360x480: of budgets by the
    kernels, of networks of baselines.py in ONNX Runtime, if its file is given. The words say which of those with
    exits."""
    found, *clocks = facts
    ms, rows = clocks[0]["sizes"]["360x480"] if clocks else {}, []
    for asked in ALTERNATIVES:
        runs = found["networks"].get(words.strip(), [])
        some = [row for run in runs for row in run["budgets"] if row["asked"] == asked]
        if some:
            text = f"{100 * asked:.0f}%"
            rows.append([f"`--budget {text}`", *_scored(some), "", f"{ms[f'budget {text}']['ms']:.0f}"])
    for name, runs in found["networks"].items():
        if not runs[0]["budgets"]:
            sizes = [[run["sizes"][k] for run in runs] for k in range(len(runs[0]["sizes"]))]
            own = next(some for some in sizes if some[0]["size"] == 1)
            best = max(sizes, key=lambda some: sum(row["miou"] for row in some))
            time = ms.get(found["experiment"]["networks"][name].get("baseline"))
            times = f"{_scored(best)[1]} ({best[0]['size']:g})"
            rows.append([name, *_scored(own), times, "" if time is None else f"{time['ms']:.0f}"])
    head = ["", "cost, %", "mIoU, %", "at its best size (times the sides)", "ms at 360x480"]
    return table(head, rows) if clocks else table(head[:-1], [row[:-1] for row in rows])


def _scored(runs: Sequence[Facts]) -> tuple[str, str]:
    """Mean cost, and mean score with its standard deviation over the seeds."""
    scores = [100 * run["miou"] for run in runs]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return _share(statistics.fmean(run["cost"] for run in runs)), f"{statistics.fmean(scores):.1f}{spread}"


def _between(share: float, costs: Sequence[float], scores: Sequence[float]) -> float | None:
    """The score at a cost, between the two measured ones beside it; None beyond those."""
    if not costs[0] <= share <= costs[-1]:
        return None
    above = next(i for i, cost in enumerate(costs) if cost >= share)
    if above == 0:
        return scores[0]
    weight = (share - costs[above - 1]) / (costs[above] - costs[above - 1])
    return scores[above - 1] + weight * (scores[above] - scores[above - 1])
