"""What pages are about, made up: evaluations, histories, features, and how they were made."""

import json
from pathlib import Path

from sae_core.data_processing.sources import Chapter, Dropped, Sources
from sae_core.reporting.feature_page import write_page
from sae_core.reporting.page import Making, Run
from sae_core.reporting.provenance import Environment, Job

SUBJECTS = ("physics", "chemistry", "biology")


def an_evaluation(layer=9, k=32, name=None, **changes):
    hook = f"blocks.{layer}.hook_resid_post"
    return {
        "run_name": name or f"org_model.{hook}.btop{k}sae.exp8",
        "model_name": "org/model",
        "hook_spec": hook,
        "sae_type": "batch_topk" if k else "standard",
        "d_in": 64,
        "d_sae": 512,
        "top_k": k,
        "l0": k + 1 / 3,
        "l0_quantiles": {"0.05": 11.0, "0.25": 22.0, "0.5": 31.0, "0.75": 41.0, "0.95": 63.0},
        "fvu": 0.1 + layer / 700,
        "fvu_with_outliers": 0.05,
        "ce_clean": 2.1234567890123456,
        "ce_sae": 2.3,
        "ce_mean_ablation": 7.7,
        "ce_zero_ablation": 11.1,
        "loss_recovered": 1 - 0.4 / (k + 8) - layer / 1000,
        "kl": 0.21,
        "dead_fraction": 12 / 512,
        "density_histogram": {
            "log10_edges": [-4.0, -3.0, -2.0, -1.0, 0.0],
            "counts": [50, 300, 120, 30],
            "never": 12,
        },
        "block_mse": {str(later): 0.01 * later for later in range(layer + 1, 30)},
        "block_mse_mean": 0.2,
        "block_mse_min": 0.1,
        "block_mse_max": 0.3,
        "n_tokens": 12288,
        "n_windows": 48,
        "n_outlier_tokens": 51,
        "held_out_repeated": 0.0731,
        "n_left_alone": 48,
        "ce_sae_all_spliced": 2.9,
        "loss_recovered_all_spliced": 0.91,
        "kl_all_spliced": 0.77,
        "n_left_alone_all_spliced": 0,
        "ce_sae_sinks_kept": 2.25,
        "loss_recovered_sinks_kept": 0.987,
        "kl_sinks_kept": 0.19,
        "n_left_alone_sinks_kept": 99,
        "ce_sae_by_norm": 2.27,
        "loss_recovered_by_norm": 0.985,
        "kl_by_norm": 0.2,
        "n_left_alone_by_norm": 98,
    } | changes


def a_history(n_epochs=3, validation=True):
    history = {
        "epoch": list(range(1, n_epochs + 1)),
        "loss": [0.5 / epoch for epoch in range(1, n_epochs + 1)],
        "sparsity": [32.0] * n_epochs,
        "dead_feature_percentage": [1.5] * n_epochs,
    }
    if validation:
        history |= {"val_loss": history["loss"], "val_sparsity": [31.0] * n_epochs}
    return history


def a_config(**metadata):
    origin = {
        "max_text_length": 128,
        "val_fraction": 0.15,
        "seed": 420,
        "data_sha256": "d" * 64,
        "tokens": 98304,
        "epochs": 3,
        "outlier_tokens": 17,
        "outlier_norm": 512.5,
        "torch_version": "2.13.0",
    }
    return {"device": "cpu", "n_batches_to_dead": 200, "metadata": origin | metadata}


def a_run(evaluation, features=None):
    return Run(evaluation, a_history(), a_config(), "a" * 64, features)


def a_making(**changes):
    sources = Sources(
        (Chapter("physics", "physics/one.md", 40, 2100), Chapter("biology", "bio/two.md", 9, 400)),
        {"duplicate": Dropped(10, 596), "too short": Dropped(22, 78)},
    )
    jobs = [Job("harvest", "org_model.hook_resid_post", 31.5, 60.25, 812.0)]
    jobs += [Job("train", "run a", 8.0, None, 300.0)]
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    made = {
        "environment": Environment("c" * 40, "3.11.2", "Linux x86_64", versions),
        "sources": sources,
        "jobs": jobs,
        "models": [{"name": "org/model", "source": "the Hub", "commit": "0123abc"}],
        "config": "models:\n- name: org/model\n",
    }
    return Making(**made | changes)


def a_corpus(run_name="org_model.blocks.9.hook_resid_post.btop32sae.exp8", subjects=SUBJECTS):
    found = {
        subject: {"tokens": 4000, "specific_features": 30 + i, "most_active": [7, 400 + i]}
        for i, subject in enumerate(subjects)
    }
    return {
        "run_name": run_name,
        "model_name": "org/model",
        "hook_spec": "blocks.9.hook_resid_post",
        "sae_type": "batch_topk",
        "d_sae": 512,
        "n_windows": 95,
        "window_length": 128,
        "end_of_text": "<|end|>",
        "n_tokens": 12000,
        "n_texts": 240,
        "n_outlier_tokens": 3,
        "l0": 31.9,
        "active": 490,
        "density_histogram": an_evaluation()["density_histogram"],
        "position": {"only_position_0": 2, "only_position_0_share": 0.0039, "l0_position_0": 60.0},
        "similarity": {
            "nearest_cosine": {"edges": [-1.0, 0.0, 0.5, 1.0], "counts": [0, 400, 90]},
            "mean": 0.4,
            "above_0.9": 5,
        },
        "co_occurrence": {
            "sampled_tokens": 12000,
            "pairs": [[7, 12, 40, 0.81, 7.9, 0.89], [7, 400, 9, 0.2, 2.0, 0.3]],
        },
        "subjects": found,
        "map": {
            "points": [[7, 1.0, -0.5], [12, 0.9, -0.4], [400, -1.0, 0.25], [499, 0.1, 1.0]],
            "together": {
                "features": [400, 7, 12],
                "pairs": [[0, 1, 0.2, 2.0, 0.3], [1, 2, 0.81, 7.9, 0.89]],
                "clusters": [[1, 3]],
                "close": 0.2,
            },
            "near": [[7, 12, 0.42, 0.81], [12, 400, 0.3, 0.0]],
        },
        "probes": some_probes() if found else None,
        "absorption": {
            "mean": {"fraction": 0.125, "full": 0.0625, "n_features": 1.5},
            "letters": dict.fromkeys("stuvw", {}),
        },
    }


def some_probes():
    by_k = {"1": 0.71, "2": 0.8, "5": 0.86, "20": 0.93}
    random = {"1": 0.51, "2": 0.52, "5": 0.55, "20": 0.6}
    mean = {"dense": 0.95, "sae": by_k, "random": random}
    return {
        "n_train": 300,
        "n_test": 100,
        "mean": mean | {"perturbation": {"5": 0.1, "20": 0.21, "100": 0.3}},
        "subjects": {},
    }


def a_window(word, activation, subject="physics"):
    return {
        "text": 3,
        "chapter": f"{subject}_chapters/one.md" if subject else None,
        "subject": subject,
        "position": 11,
        "peak": 2,
        "tokens": ["The", " great", f" {word}", " of", "\n", "x"],
        "activations": [0, activation / 4, activation, 0, 0, 0],
    }


def an_entry(feature, word="energy", density=0.01, shares=(0.7, 0.2, 0.1)):
    subjects = dict(zip(SUBJECTS, shares, strict=False))
    windows = [a_window(word, 8.0 - i, SUBJECTS[i % 3] if subjects else None) for i in range(4)]
    return {
        "feature": feature,
        "label": f"{word} (84%), {SUBJECTS[0]}",
        "peaks": [[word.replace(" ", "␣"), 3], ["x", 1]],
        "density": density,
        "tokens": 120,
        "windows": 60,
        "mean": 2.5,
        "max": 8.0,
        "position_0": 0.0,
        "subjects": subjects,
        "histogram": {"log2_edges": [0.0, 1.0, 2.0, 3.0], "counts": [70, 40, 10]},
        "promoted": [[f" {word}s", 3.5], [" joule", 2.0]],
        "suppressed": [[" cell", -3.0]],
        "neighbours": [[12, 0.42], [499, 0.3]],
        "partners": [[12, 0.81, 40]],
        "top": windows,
        "quantiles": [{"quantile": 0.5} | a_window(word, 1.5)],
    }


def entries():
    return [
        an_entry(7, density=0.02),
        an_entry(12, "acid", 0.005, (0.05, 0.9, 0.05)),
        an_entry(400, "membrane", 0.1, (0.0, 0.1, 0.9)),
        an_entry(31, "the", 0.0004, (0.3, 0.3, 0.4)),
    ]


def figures_of(tokens, of=12000):
    """The part of the figures that follows from the number of `tokens` on which each is active."""
    return {"n_tokens": of, "active": len(tokens), "l0": float(f"{sum(tokens) / of:.4g}")}


def a_label(feature, **changes):
    return {
        "feature": feature,
        "label": f"what {feature} is about",
        "description": "It fires on that.",
        "confidence": 0.9,
        "detection": 0.81,
        "fuzzing": 0.72,
        "status": "ok",
    } | changes


def write_lines(path: Path, objects) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects))
    return path


def write_features(
    folder: Path, entries, corpus=None, labels=None, report="../report.html"
) -> Path:
    """A page about features with its data; gives the page."""
    corpus = corpus or a_corpus()
    n_tokens = []

    def counted():
        for entry in entries:
            n_tokens.append(entry["tokens"])
            yield entry

    lines = write_lines(folder / f"{corpus['run_name']}.jsonl", counted())
    figures = folder / f"{corpus['run_name']}.json"
    figures.write_text(json.dumps(corpus | figures_of(n_tokens)))
    by_llm = write_lines(folder / "labels.jsonl", labels) if labels else None
    page = folder / f"{corpus['run_name']}.html"
    write_page(page, lines, figures, "../report.html", by_llm)
    return page


def write_run(folder: Path, evaluation, corpus=None) -> tuple[Path, Path, Path]:
    """The files of an SAE: its evaluation, its directory, the figures of its features."""
    name = evaluation["run_name"]
    files = {
        f"saes/{name}/history.json": a_history(),
        f"saes/{name}/config.json": a_config(),
        f"evaluations/{name}.json": evaluation,
        f"features/{name}.json": corpus or a_corpus(name),
    }
    for place, content in files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(json.dumps(content))
    (folder / f"saes/{name}/weights.pt").write_bytes(b"weights")
    return (
        folder / f"evaluations/{name}.json",
        folder / "saes" / name,
        folder / f"features/{name}.json",
    )
