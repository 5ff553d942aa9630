"""What jobs will cost: against a model's own parameters, and against what was measured."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_model import configuration
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sae_core.sae.config import SAEConfig
from sae_core.sae.dense_start import near_at_start
from sae_core.utils.code_hash import ROOT
from sae_core.workflow import fitting, plain_step, plan_jobs
from sae_core.workflow.costs import Cost
from sae_core.workflow.gpu_step import step_bytes
from sae_core.workflow.plan_tables import (
    Machine,
    ModelShape,
    Tables,
    corpus_tokens,
    downloads,
    sufficiency,
)
from sae_core.workflow.planning import Planner
from sae_core.workflow.workflow_config import Plan, load_plan

TABLES = Tables.load(ROOT / "config/planning.yaml")
CPU = TABLES.machines["cpu"]
SMOLLM2 = TABLES.shapes["SmolLM2-135M-Instruct"]
WITHIN = 1.5
"""Factor that a plan may be wrong by."""


def planned(config: dict[str, Any]) -> Plan:
    return load_plan(
        {"chapters": {"folders": {"a": "b"}}, **config},
        ROOT / "workflow/schemas/config.schema.yaml",
    )


def planner(
    config: dict[str, Any], tokens: float, shape: ModelShape = SMOLLM2, machine: Machine = CPU
) -> Planner:
    """The planner of a configuration's only model."""
    plan = planned(config)
    [model] = plan.models.values()
    return Planner(plan, model, shape, machine, tokens)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_parameters_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    config = configuration(family)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert ModelShape.read(tmp_path).parameters == sum(p.numel() for p in matrices)


@pytest.mark.parametrize(
    ("name", "billions"), [("0.6B", 0.596), ("1.7B", 1.72), ("8B", 8.19), ("32B", 32.76)]
)
def test_the_table_has_models_of_the_size_that_they_are_named_after(
    name: str, billions: float
) -> None:
    shape = TABLES.shapes[f"Qwen/Qwen3-{name}"]
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_model_of_another_architecture_is_named(tmp_path: Path) -> None:
    configuration("gpt2").save_pretrained(tmp_path)
    with pytest.raises(Exception, match="the model's shape cannot be read"):
        ModelShape.read(tmp_path)


def measured_steps() -> list[tuple[str, int, int, int, int, float]]:
    """(machine, d, features, k, tokens, seconds) of the step tables in docs/benchmarks.md, `auto`.

    Those of the GPU have a heading of their own.
    """
    found, machine = [], "cpu"
    for line in (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            machine = "h200" if "H200" in line else "cpu"
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 11 and re.fullmatch(r"[\d,]+(, [\d,]+){3}", cells[0]):
            d, width, k, n = (int(number.replace(",", "")) for number in cells[0].split(", "))
            found.append((machine, d, width, k, n, float(cells[4]) / 1000))
    return found


def test_the_steps_of_both_machines_are_in_the_tables() -> None:
    assert {name for name, *_ in measured_steps()} == {"cpu", "h200"}


@pytest.mark.parametrize(("machine", "d", "width", "k", "tokens", "seconds"), measured_steps())
def test_a_step_takes_what_was_measured(
    machine: str, d: int, width: int, k: int, tokens: int, seconds: float
) -> None:
    shape = ModelShape(1, d, 1, 1, 64, d, 1000, True)
    from_memory = dataclasses.replace(TABLES.machines[machine], disk_gb_s=1e9)
    steps = 1000
    plan = planner(
        {
            "windows": {"max_text_length": 1025, "val_fraction": 0.001},
            "training": {"num_epochs": 1, "tokens_per_step": tokens},
            "end_to_end": {"use_end_to_end": False},
            "models": [
                {"name": "m", "layers": [0], "saes": [{"sae_expansion": width // d, "topk": k}]}
            ],
        },
        tokens=steps * tokens * 1025 / 1024 / 0.999 + 1025,
        shape=shape,
        machine=from_memory,
    )
    [run] = plan.model.runs(1)
    cost = plan.training(run)
    assert cost.tokens / tokens == pytest.approx(steps, abs=2)
    each = (cost.seconds - plan.machine.start_seconds) / steps
    assert seconds / WITHIN < each < seconds * WITHIN


def test_steps_whose_size_is_automatic() -> None:
    def cost(tokens_per_step: int | str) -> Cost:
        plan = demo_planner(training={"num_epochs": 34, "tokens_per_step": tokens_per_step})
        return plan.training(next(plan.model.runs(30)))

    assert cost("auto") == cost(256) != cost(4096)


def test_a_harvest_takes_what_was_measured() -> None:
    """8,341 tokens a second up to layer 14 of SmolLM2-135M (docs/benchmarks.md, bfloat16)."""
    plan = planner(
        {"windows": {"max_text_length": 256}, "models": [{"name": "m", "layers": [14]}]}, tokens=1e6
    )
    [cost] = plan.harvests()
    rate = cost.tokens / (cost.seconds - CPU.start_seconds)
    assert 8341 / WITHIN < rate < 8341 * WITHIN


def test_the_stored_activations_are_counted_exactly() -> None:
    """195 and 16 windows of 127 positions on two layers, as the example's harvest stores them."""
    config = yaml.safe_load((ROOT / "config/demo.yaml").read_text(encoding="utf-8"))
    plan = planner(config, tokens=29_500)
    assert (plan.n_train, plan.n_validation) == (195, 17)
    [cost] = plan.harvests()
    assert cost.disk == (195 + 17) * 127 * 576 * 2 * 2


def demo_planner(**sections: dict[str, Any]) -> Planner:
    config = yaml.safe_load((ROOT / "config/demo.yaml").read_text(encoding="utf-8"))
    return planner({**config, **sections}, tokens=29_500)


def test_the_features_of_all_windows_are_analysed() -> None:
    plan = demo_planner()
    run = next(plan.model.runs(30))
    assert plan.features(run).tokens == (195 + 34) * 128, "held-out ones, too"


def test_every_epoch_that_ends_in_the_end_to_end_phase_is_validated_in_it() -> None:
    """Of 16 epochs, 3% and 6% of the steps reach one end, 7% and 9% two."""
    flops = []
    for share in (0.03, 0.06, 0.07, 0.09):
        plan = demo_planner(end_to_end={"end_to_end_fraction": share})
        flops.append(plan.training(next(plan.model.runs(30))).flops)
    one_percent = (flops[1] - flops[0]) / 3
    assert (flops[3] - flops[2]) / 2 == pytest.approx(one_percent)
    assert flops[2] - flops[1] > 1.1 * one_percent


def test_a_phase_in_which_fewer_windows_are_spliced_costs_less() -> None:
    """By their number, beside the pass of all windows up to the hook."""

    def flops(stride: int) -> float:
        plan = demo_planner(end_to_end={"end_to_end_stride": stride})
        return plan.training(next(plan.model.runs(30))).flops

    spliced = 4 * (flops(2) - flops(4))
    assert flops(4) - flops(8) == pytest.approx(spliced / 8)
    assert 0 < flops(1) - flops(2) < spliced / 2


def test_active_adam_keeps_no_second_moment_of_the_decoder() -> None:
    """Nor does the copy of the state that a CPU writes."""
    plans = [demo_planner(training={"optimizer": name}) for name in ("adam", "active_adam")]
    plain, other = (plan.training(next(plan.model.runs(30))).memory for plan in plans)
    assert plain - other == 2 * 4 * 576 * 4608


def test_logits_take_more_than_their_product() -> None:
    small = demo_planner()
    run = next(small.model.runs(30))
    shape = dataclasses.replace(SMOLLM2, vocab_size=2 * SMOLLM2.vocab_size)
    large = Planner(small.plan, small.model, shape, CPU, 29_500)
    for cost in (Planner.evaluation, Planner.training):
        flops = cost(large, run).flops - cost(small, run).flops
        read = (large.model_bytes - small.model_bytes) / CPU.disk_gb_s / 1e9
        seconds = cost(large, run).seconds - cost(small, run).seconds - read
        assert seconds > 1.2 * flops / CPU.model_tflops / 1e12


def test_all_layers_of_all_models(run: Callable[..., Any]) -> None:
    printed = run(
        "scripts/plan.py", "--config", "config/all_layers.yaml", "--machine", "h100",
        "--corpus-tokens", "1e9",
    ).stdout  # fmt: skip
    lines = printed.splitlines()
    jobs = {
        rule: [line for line in lines if line.startswith(rule)] for rule in ("train", "harvest")
    }
    assert len(jobs["train"]) == 232 + 1 and len(jobs["harvest"]) == 6 + 1
    assert "Qwen_Qwen3-32B.blocks.63.hook_resid_post.btop128sae.exp4" in jobs["train"][231]
    [whole] = [line.split() for line in lines if line.startswith("all ")]
    hours = float(whole[-1].replace(",", ""))
    assert hours > 100
    assert "assumed, not measured" in lines[-1]


def test_tokens_below_0_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        plan_jobs.main(["--config", str(ROOT / "config/demo.yaml"), "--corpus-tokens", "-4"])
    assert "error: --corpus-tokens -4.0: must be above 0" in capsys.readouterr().err


def test_a_billion_tokens_both_ways(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store would hold every token of training and validation at every layer."""
    monkeypatch.chdir(ROOT)
    config = "config/billion_tokens.yaml"
    with pytest.raises(SystemExit, match="0"):
        plan_jobs.main(["--config", config, "--machine", "h100", "--corpus-tokens", "1e9"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("stream") for line in lines) == 7 + 1
    assert not any(line.startswith("harvest") for line in lines)
    tokenized = next(line for line in lines if line.startswith("tokenize")).split()
    assert float(tokenized[-3]) == 1e9 * (4 + 4.5) / 1e9 and float(tokenized[-1]) > 0.2
    gigabytes = [
        float(line.split("jobs,")[1].split()[0].replace(",", ""))
        for line in lines
        if line.startswith("SAEs with harvest.store")
    ]
    assert gigabytes[0] == pytest.approx(28 * 1024 * 2 * 0.9975 * 511 / 512, rel=0.01)
    assert gigabytes[1] < 100
    page = (ROOT / config).read_text(encoding="utf-8")
    assert f"{gigabytes[0] / 1000:.0f} TB" in page and "!" not in "".join(lines)


def test_a_stream_runs_the_model_once_for_all_its_saes() -> None:
    def streams(**model: Any) -> list[float]:
        sections = {"harvest": {"store": False}, "end_to_end": {"use_end_to_end": False}}
        own = {"name": "m", "layers": [4, 9], "saes": [{"topk": 32}], **model}
        plan = demo_planner(**sections, models=[own])
        [cost], [one, *_] = plan.streams(), plan.model.runs(30)
        stored = [plan.training(run).flops for run in plan.model.runs(30)]
        model_flops = cost.flops - sum(stored)
        assert cost.disk == len(stored) * plan.training(one).disk
        return [model_flops / cost.tokens, cost.tokens]

    two, six = streams(), streams(saes=[{"topk": k} for k in (8, 16, 32)])
    assert two == pytest.approx(six)
    assert two[0] == pytest.approx(SMOLLM2.flops(10, 128))
    assert two[1] == 16 * (195 + 17) * 128


def test_what_is_not_known_is_named(run: Callable[..., Any], tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "config/demo.yaml").read_text(encoding="utf-8"))
    config["models"] = [{"name": "someone/unknown", "layers": [1]}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ("scripts/plan.py", "--config", tmp_path / "config.yaml")
    assert "someone/unknown: neither in the table" in run(*command, ok=False).stderr
    assert "--machine tpu: the tables have cpu, a100, h100" in run(
        *command, "--machine", "tpu", ok=False
    ).stderr  # fmt: skip


def test_a_corpus_that_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        plan_jobs.main(["--config", str(ROOT / "config/demo.yaml")])
    assert "demo.yaml: its texts are not here" in capsys.readouterr().err


SHIPPED = load_plan(
    yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8")),
    ROOT / "workflow/schemas/config.schema.yaml",
)


def test_compressed_texts_are_longer_than_their_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 450)
    (tmp_path / "b.jsonl.zst").write_bytes(b"x" * 450)
    config = {"corpus": {"data_path": str(tmp_path)}, "models": [{"name": "m"}]}
    plan = load_plan(config, ROOT / "workflow/schemas/config.schema.yaml")
    assert corpus_tokens(plan) == pytest.approx(100 + 280)


def test_what_the_shipped_configuration_downloads_is_said_where_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    gigabytes = sum(2 * TABLES.shapes[name].parameters for name in NAMES) / 1e9
    said = downloads(SHIPPED, TABLES, tmp_path)
    assert said and f"{gigabytes:,.1f} GB" in said and all(name in said for name in NAMES)
    tokens = f"{corpus_tokens(SHIPPED):,.0f} tokens"
    assert tokens in sufficiency(corpus_tokens(SHIPPED))
    for page in ("config/config.yaml", "README.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").replace("\n#", "").split())
        assert f"{gigabytes:.0f} GB" in text and tokens in text, page


NAMES = [model.name for model in SHIPPED.models.values()]


def test_what_is_here_is_not_downloaded(tmp_path: Path) -> None:
    for model in list(SHIPPED.models.values())[1:]:
        (tmp_path / f"{model.model_id}.json").write_text("{}")
    said = downloads(SHIPPED, TABLES, tmp_path)
    assert said and ": 1.2 GB (Qwen/Qwen3-0.6B)" in said
    (tmp_path / "Qwen_Qwen3-0.6B.json").write_text("{}")
    assert downloads(SHIPPED, TABLES, tmp_path) is None


@pytest.mark.parametrize(
    ("models", "size"),
    [
        ([{"name": "a/b"}], "of unknown size (a/b)"),
        ([{"name": "a/b"}, {"name": "Qwen/Qwen3-0.6B"}], "1.2 GB and 1 of unknown size (a/b, "),
        ([{"name": "a", "source": {"path": "/a"}}], None),
        ([{"name": "a", "source": {"wheel": "a==1", "sha256": "0" * 64, "gguf": "a"}}], None),
    ],
)
def test_models_of_other_origins(
    models: list[dict[str, Any]], size: str | None, tmp_path: Path
) -> None:
    said = downloads(planned({"models": models}), TABLES, tmp_path)
    assert (said is None) if size is None else (said is not None and size in said)


@pytest.mark.parametrize(("tokens", "enough"), [(3e4, False), (999_999, False), (1e6, True)])
def test_whether_the_text_is_enough(tokens: float, enough: bool) -> None:
    assert ("SAEs worth studying need" in sufficiency(tokens)) != enough


LARGE_VOCABULARY = ModelShape(4, 640, 4, 1, 256, 2048, 262144, True)
"""Four blocks as Gemma-3-270m's, with its vocabulary."""


@pytest.mark.parametrize(
    ("job", "dtype", "measured"),
    [
        ("training", "float32", 3.253),
        ("evaluation", "float32", 1.835),
        ("evaluation", "bfloat16", 1.521),
    ],
)
def test_memory_with_a_large_vocabulary(job: str, dtype: str, measured: float) -> None:
    """Most memory that the processes held, in GB, on a CPU; 63,000 tokens in windows of 512."""
    plan = planner(
        {
            "training": {"num_epochs": 1, "tokens_per_step": 1024},
            "models": [
                {"name": "m", "model_dtype": dtype, "layers": [1], "saes": [{"topk": 40}]},
            ],
        },
        tokens=69120,
        shape=LARGE_VOCABULARY,
    )
    [run] = plan.model.runs(4)
    assert 1 <= getattr(plan, job)(run).memory / 1e9 / measured <= 1.25


def test_weights_in_memory() -> None:
    """`auto` may be float32 on a CPU, and is not on a GPU; the rows are those of the code."""
    from sae_core.evaluation import metrics
    from sae_core.sae import losses
    from sae_core.workflow import planning

    assert metrics.LOGIT_ROWS == planning.EVALUATED_ROWS
    assert losses.LOGIT_ROWS == planning.TRAINED_ROWS
    assert losses.KERNEL_ROWS == planning.KERNEL_ROWS
    loaded = {
        (name, dtype): planner(
            {"models": [{"name": "m", "model_dtype": dtype}]}, 1e6, machine=TABLES.machines[name]
        ).loaded_bytes
        / SMOLLM2.parameters
        for name in ("cpu", "h100")
        for dtype in ("auto", "float32", "bfloat16")
    }
    assert list(loaded.values()) == [4, 4, 2, 2, 4, 2]


def test_what_fits_is_in_the_documentation() -> None:
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    assert text == fitting.with_table(text) and text.count("| Qwen/Qwen3-") == 18


def test_what_a_job_needs_on_a_gpu() -> None:
    """The model, its blocks up to the middle one, and an SAE in training, from closed forms."""
    shape = TABLES.shapes["Qwen/Qwen3-32B"]
    needed = {e: list(fitting.memory(TABLES, "Qwen/Qwen3-32B", e)) for e in fitting.EXPANSIONS}
    half, whole = 2 * (shape.parameters - 32 * shape.block), 2 * shape.parameters
    for harvest, training, evaluation, features in needed.values():
        assert half / 1e9 < harvest < half / 1e9 + 3 < 0.6 * whole / 1e9
        assert min(training, evaluation, features) > whole / 1e9
    step = needed[16][1] - needed[8][1]
    assert step == pytest.approx(18 * 2 * 8 * shape.d_model**2 / 1e9)


def test_a_training_without_an_end_to_end_phase_needs_no_model() -> None:
    def memory(**config: Any) -> float:
        given = {"models": [{"name": "m", "layers": [1]}], "end_to_end": config}
        plan = planner(given, 1e6, TABLES.shapes["Qwen/Qwen3-4B"], TABLES.machines["h100"])
        return plan.training(next(plan.model.runs(36))).memory / 1e9

    assert memory() > 8 > 7 > memory(use_end_to_end=False)


def test_a_training_needs_the_memory_of_its_step() -> None:
    """What a step holds beyond the gradient, which the state contains; on a CPU those of kinds with
    a top-k are not counted."""
    d, tokens = 2560, 8192

    def memory(kind: str, machine: str) -> float:
        config = {
            "models": [{"name": "m", "layers": [1], "saes": [{"sae_type": kind, "topk": 64}]}],
            "training": {"tokens_per_step": tokens},
            "end_to_end": {"use_end_to_end": False},
        }
        plan = planner(config, 1e7, TABLES.shapes["Qwen/Qwen3-4B"], TABLES.machines[machine])
        return plan.training(next(plan.model.runs(36))).memory

    sae = SAEConfig("batch_topk", 4, topk=64)
    step = step_bytes(sae, d, tokens, exact=False) - 4 * 2 * d * 4 * d
    bare = memory("batch_topk", "h100") - step
    assert step > 3e8 and memory("batch_topk", "cpu") == memory("topk", "cpu")
    for kind in ("standard", "gated", "jumprelu"):
        own = SAEConfig(kind, 4, topk=64)
        for machine, start in (("h100", bare), ("cpu", memory("topk", "cpu"))):
            is_cpu = machine == "cpu"
            planned = plain_step.step_bytes(own, d, tokens, exact=is_cpu, is_cpu=is_cpu)
            assert 7e8 < planned == pytest.approx(memory(kind, machine) - start)


def test_a_dense_code_is_there_beside_the_model_in_the_end_to_end_phase() -> None:
    """That of JumpReLU is sparse by then."""
    tokens = 1024

    def memory(kind: str) -> float:
        plan = planner(
            {
                "models": [{"name": "m", "layers": [1], "saes": [{"sae_type": kind}]}],
                "training": {"tokens_per_step": tokens},
            },
            1e6,
            TABLES.shapes["Qwen/Qwen3-4B"],
            TABLES.machines["h100"],
        )
        return plan.training(next(plan.model.runs(36))).memory

    step = plain_step.step_bytes(SAEConfig("gated"), 2560, tokens, exact=False, is_cpu=False)
    assert 1e8 < step == pytest.approx(memory("gated") - memory("jumprelu"))


def test_jumprelus_dense_steps_are_counted() -> None:
    """In pairs on a CPU, and with float32 values; as matrices where a GPU multiplies those fast."""

    def flops(kind: str, machine: str, **training: Any) -> float:
        config = {
            "models": [{"name": "m", "layers": [1], "saes": [{"sae_type": kind, "topk": 64}]}],
            "training": {"tokens_per_step": 1024, "num_epochs": 1, **training},
            "end_to_end": {"use_end_to_end": False},
        }
        plan = planner(config, 1e7, TABLES.shapes["Qwen/Qwen3-4B"], TABLES.machines[machine])
        cost = plan.training(next(plan.model.runs(36)))
        return cost.flops / cost.tokens

    d, width, start = 2560, 4 * 2560, 16 * 64
    in_pairs = plain_step.THINNING * d * (2 * near_at_start(d, width, 64) + 6 * start)
    as_matrix = plain_step.THINNING * 8 * d * width
    for machine, training, more in (
        ("cpu", {}, in_pairs),
        ("h100", {"compute_dtype": "float32"}, in_pairs),
        ("h100", {}, as_matrix),
    ):
        sparse = flops("topk", machine, **training)
        assert flops("jumprelu", machine, **training) - sparse == pytest.approx(more)
    assert flops("multi_batch_topk", "cpu") - flops("topk", "cpu") == pytest.approx(8 * d * 64)
