"""A draft's card: `card.md.jinja` filled in from the files in the draft's folder, and from nothing else.

Figures come from metrics.json (`metrics.py`), training.json (the record of the training run), the configurations and the
weights; a figure that a file should hold and does not is an error. What only a person can say is in about.json.
"""

import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from transformers_prism.hub.files import ABOUT, CARD, CURVES, METRICS, PLACEHOLDER_USER, PLOT, TRAINING
from transformers_prism.hub.metrics import KINDS, gather, read_metrics
from transformers_prism.hub.weight_headers import read_weight_headers
from transformers_prism.policy.settings import default_tree_settings
from transformers_prism.whole_files import read_json, write_json, write_text

TEMPLATE = Path(__file__).with_name("card.md.jinja")
ABOUT_KEYS = ("license", "base_model", "language", "target", "data", "limits")
_ABOUT_LISTS = ("language", "limits")
# The placeholder in a card's code for a target without a name on the Hub.
UNNAMED_TARGET = "name/of-the-target"
# A draft step that fewer rounds reached is too noisy to plot.
MIN_ROUNDS = 20


def write_card(folder: str | Path, measurements: list[Path] | None = None, with_plot: bool = True) -> list[str]:
    """Write a draft's README.md, and with measurements first metrics.json and the plot; returns the names of the
    files.

    Args:
        measurements (`list[Path]`, *optional*): see [`gather`]. If None, metrics.json stays as it is; where there is
            none, one without figures is written.
        with_plot (`bool`): draw the plot if there are figures for it; needs matplotlib.
    Raises:
        ImportError: if the plot needs matplotlib and it is missing.
        ValueError: if a figure is missing or a file is unusable. No file is changed then.
    """
    folder = Path(folder)
    if measurements is None and not (folder / METRICS).is_file():
        measurements = []
    metrics = gather(folder, measurements) if measurements is not None else read_metrics(folder)
    return _write(folder, metrics, with_plot, has_new_metrics=measurements is not None)


def _write(folder: Path, metrics: dict, with_plot: bool, has_new_metrics: bool) -> list[str]:
    card = render_card(folder, metrics)
    written = [CARD]
    if with_plot and step_shares(metrics):
        plot_step_shares(metrics, folder / PLOT)
        written.append(PLOT)
    if has_new_metrics:
        write_json(folder / METRICS, metrics)
        written.append(METRICS)
    write_text(folder / CARD, card)
    return written


def add_to_card(folder: str | Path, measurement: Path) -> list[str]:
    """Write a draft's card with one more measurement, which replaces one with the same settings and hardware; returns
    the names of the files. Errors are those of [`write_card`]."""
    added = gather(folder, [measurement])
    known = read_metrics(folder) if (Path(folder) / METRICS).is_file() else {kind: [] for kind in KINDS}
    for kind in KINDS:
        places = [(record["hardware"], record["settings"]) for record in added[kind]]
        kept = [record for record in known[kind] if (record["hardware"], record["settings"]) not in places]
        added[kind] = kept + added[kind]
    return _write(Path(folder), added, with_plot=True, has_new_metrics=True)


def name_target(folder: str | Path, name: str) -> None:
    """Write the target's name on the Hub into a draft's about.json, for its card.

    Raises:
        ValueError: if it is no such name.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"base_model: expected the target's name on the Hub, user/name, got {name!r}")
    about = {key: value for key, value in _read_about(Path(folder) / ABOUT).items() if value is not None}
    write_json(Path(folder) / ABOUT, {**about, "base_model": name})


def names_target(folder: str | Path) -> bool:
    """Whether a draft's files name its target."""
    fingerprint = read_json(Path(folder) / "config.json").get("target_fingerprint") or {}
    return bool(_read_about(Path(folder) / ABOUT)["base_model"] or fingerprint.get("name"))


def render_card(folder: str | Path, metrics: dict | None = None) -> str:
    """The text of a draft's card. The folder's name is the draft's name. Figures are those of `metrics`, as [`gather`]
    returns them, by default those of metrics.json."""
    folder = Path(folder).resolve()
    config = read_json(folder / "config.json")
    about = _read_about(folder / ABOUT)
    metrics = read_metrics(folder) if metrics is None else metrics
    training = read_json(folder / TRAINING) if (folder / TRAINING).is_file() else None
    fingerprint = config.get("target_fingerprint") or {}
    target_id = about["base_model"] or fingerprint.get("name") or UNNAMED_TARGET
    template_text = TEMPLATE.read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # A cell without a value, such as tau of an answer that took no round, is empty.
    environment.filters["fixed"] = lambda value, digits: "" if value is None else f"{value:.{digits}f}"
    try:
        text = environment.from_string(template_text).render(
            name=folder.name,
            repo_id=f"{PLACEHOLDER_USER}/{folder.name}",
            metadata=_metadata(folder.name, about, fingerprint, metrics).to_yaml(),
            about=about,
            target_id=target_id,
            is_target_named=target_id != UNNAMED_TARGET,
            fingerprint=fingerprint,
            has_tokenizer=(folder / "tokenizer.json").is_file(),
            plot=PLOT,
            curves=CURVES if (folder / CURVES).is_file() else None,
            config=config,
            tree={**default_tree_settings(), **read_json(folder / "generation_config.json")},
            facts=_facts(folder, config),
            generate=metrics["generate"],
            acceptance=metrics["acceptance"],
            verify=[{**record, "rows": verify_rows(record)} for record in metrics["verify"]],
            runs=training_runs(training),
            shares=step_shares(metrics),
        )
    except (KeyError, TypeError, jinja2.UndefinedError) as error:
        raise ValueError(
            f"{folder.name}: expected every figure of the card in its files, got none: {error}"
        ) from error
    text = text.rstrip() + "\n"
    # Fails if the Hub's client cannot parse the metadata.
    ModelCard(text)
    return text


def training_runs(training: dict | None) -> list[dict]:
    """A training record and those of the drafts that it continued, the oldest first."""
    runs: list[dict] = []
    while training is not None:
        begun_from = training.get("init_from")
        # The card shows the earlier run separately.
        runs.insert(0, {**training, "init_from": begun_from and begun_from["name"]})
        training = begun_from and begun_from["training"]
    for run in runs:
        for stage in run["stages"]:
            weights = stage["stage"].get("loss") or {
                "token": run["config"]["token_weight"],
                "hidden": stage["stage"]["hidden_weight"],
            }
            stage["weights"] = {name: weight for name, weight in weights.items() if weight}
            stage["agreement"] = _agreements(stage["validation"])
            # A continued draft may have been validated before its first update, on the same conversations.
            first: dict = next(iter(stage.get("validations", ())), {})
            stage["agreement_before"] = _agreements(first) if first.get("eval_tokens_seen") == 0 else []
    return runs


def _agreements(validation: dict) -> list[float]:
    """Top-1 accuracy of each draft step, from step 0 on."""
    count = sum(name.startswith("eval_agreement_") for name in validation)
    return [validation[f"eval_agreement_{step}"] for step in range(count)]


def verify_rows(record: dict) -> list[dict]:
    """Sums over the checks of each name in a verify report; "path" is empty in reports of an earlier release."""
    rows: dict[str, dict] = {}
    for check in record["checks"]:
        row = rows.setdefault(
            check["name"],
            {"name": check["name"], "runs": 0, "tokens": 0, "identical": 0, "ties": 0, "caught": 0, "paths": {}},
        )
        row["runs"] += 1
        row["tokens"] += check["num_tokens"]
        row["identical"] += check["is_identical"]
        row["ties"] += check["is_near_tie"]
        row["caught"] += not check["is_identical"] and not check["is_near_tie"]
        row["position"] = check["position"]
        row["paths"][check.get("path_in_words", "")] = None
    return [{**row, "path": "; ".join(row.pop("paths"))} for row in rows.values()]


def step_shares(metrics: dict) -> list[dict]:
    """Per measurement, the share of rounds that accepted each draft step's token, among those that reached the step."""
    measured = []
    for record in metrics["generate"]:
        # Repeats of greedy decoding hardly add information.
        fewest = MIN_ROUNDS * record["settings"].get("repeat", 1)
        counts = [pair for pair in record["summary"]["step_counts"] if pair[0] >= fewest]
        if counts:
            shares = [accepted / reached for reached, accepted in counts]
            measured.append({"label": label_of(record), "shares": shares, "rounds": [pair[0] for pair in counts]})
    return measured


def label_of(record: dict) -> str:
    """A measurement in a few words: how it decoded, and which trees."""
    settings = record["settings"]
    decoding = "greedy"
    if settings["generate"]["do_sample"]:
        names = [name for name in settings["generate"] if name not in ("max_new_tokens", "do_sample")]
        decoding = "sampled, " + ", ".join(f"{name} {settings['generate'][name]}" for name in names)
    tree = "automatic trees" if settings["tree"] == "auto" else f"{settings['tree']} tree"
    return f"{decoding}, {tree} of at most {settings['tree_num_nodes']} nodes" + ", packed" * settings["packed"]


def plot_step_shares(metrics: dict, path: Path) -> None:
    """Draw [`step_shares`] as a PNG file."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("expected matplotlib for the plot, got none; pip install matplotlib") from error
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for series in step_shares(metrics):
        axes.plot(range(len(series["shares"])), series["shares"], marker="o", label=series["label"])
    axes.set(xlabel="draft step", ylabel="accepted, if reached", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="lower left")
    # Without the library's version, so that the same figures give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _metadata(name: str, about: dict, fingerprint: dict, metrics: dict) -> ModelCardData:
    base_model: str = about["base_model"] or fingerprint.get("name") or ""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model or "") and not base_model.endswith(".gguf")
    results = []
    for record in metrics["generate"]:
        settings, summary, prompts = record["settings"], record["summary"], Path(record["settings"]["prompts"]).stem
        source: dict[str, Any] = {
            "task_type": "text-generation",
            "dataset_type": prompts,
            "dataset_name": prompts,
            # huggingface_hub merges results with the same configuration.
            "dataset_config": f"{label_of(record)}, top-k {settings['tree_top_k']}, {settings['tree_depth']} draft steps, "
            f"batch {settings['batch_size']}, {summary['num_prompts']} prompts, {record['dtype']}, {record['hardware']}",
        }
        for metric, title, value in (
            ("acceptance_length", "acceptance length (tau, pooled)", summary["acceptance_length_pooled"]),
            ("speedup", "tokens per second over plain decoding", summary["ratio"]),
        ):
            if value is not None:
                results.append(EvalResult(**source, metric_type=metric, metric_name=title, metric_value=round(value, 3)))
    return ModelCardData(
        model_name=name if results else None,
        license=about["license"],
        language=about["language"],
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model if is_hub_id else None,
        # The Hub's relation for weights that need their base model.
        base_model_relation="adapter" if is_hub_id else None,
        tags=["speculative-decoding", "prism", "draft-model"],
        eval_results=results or None,
    )


def _facts(folder: Path, config: dict) -> dict:
    """Parameters and bytes on disk."""
    headers = read_weight_headers(folder)
    return {
        "num_parameters": headers.num_parameters(),
        "million_parameters": headers.num_parameters() / 1e6,
        "megabytes": headers.num_bytes / 1e6,
        "num_steps": len(config["draft_step_to_module"]),
    }


def _read_about(path: Path) -> dict:
    about = read_json(path) if path.is_file() else {}
    unknown = sorted(set(about) - set(ABOUT_KEYS))
    if unknown:
        raise ValueError(f"{path}: expected only {', '.join(ABOUT_KEYS)}, got {', '.join(unknown)}")
    if isinstance(about.get("limits"), str):
        about["limits"] = [about["limits"]]
    for key, value in about.items():
        is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not (value is None or isinstance(value, str) or (is_list and key in _ABOUT_LISTS)):
            expected = "text or a list of texts" if key in _ABOUT_LISTS else "text"
            raise ValueError(f"{path}: expected {expected} in {key!r}, got {value!r}")
    return {**dict.fromkeys(ABOUT_KEYS), **about}
