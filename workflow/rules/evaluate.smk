# SAE directories -> evaluations, features, plots, the summary and the pages.


rule evaluate:
    input:
        tokens=tokens,
        record=model_record,
        weights="results/saes/{run}/weights.pt",
        config="results/saes/{run}/config.json",
    output:
        evaluation="results/evaluations/{run}.json",
    log:
        "results/logs/evaluate/{run}.log",
    benchmark:
        "results/benchmarks/evaluate/{run}.tsv"
    priority: 1  # before further trainings: it deletes the last state of its own
    conda:
        with_torch("evaluate")
    threads: 8
    resources:
        gpu=1,
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        folder=subpath(input.weights, parent=True),
        results=subpath(input.weights, ancestor=3),
        options=lambda wildcards: PLAN.evaluate_options(model_plan(wildcards)),
        runtime=not_recorded(lambda wildcards: PLAN.evaluate_runtime(model_plan(wildcards))),
        code=code_of_run("scripts/evaluate.py"),
    shell:
        job(
            "evaluate.py --sae {params.folder} --tokens {input.tokens}"
            " --record {input.record} {params.options} {params.runtime}"
            " --checkpoints {params.results}/checkpoints/{wildcards.run} --output {output.evaluation}",
            gpus=True,
        )


rule features:
    input:
        tokens=tokens,
        record=model_record,
        weights="results/saes/{run}/weights.pt",
        config="results/saes/{run}/config.json",
    output:
        entries="results/features/{run}.jsonl",
        table="results/features/{run}.csv",
        corpus="results/features/{run}.json",
    log:
        "results/logs/features/{run}.log",
    benchmark:
        "results/benchmarks/features/{run}.tsv"
    conda:
        with_torch("evaluate")
    threads: 8
    resources:
        gpu=1,
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        folder=subpath(input.weights, parent=True),
        options=lambda wildcards: PLAN.features_options(model_plan(wildcards)),
        runtime=not_recorded(lambda wildcards: PLAN.model_runtime(model_plan(wildcards))),
        code=code_of_run("scripts/features.py"),
    shell:
        job(
            "features.py --sae {params.folder} --tokens {input.tokens}"
            " --record {input.record} {params.options} {params.runtime}"
            " --entries {output.entries} --table {output.table}"
            " --corpus {output.corpus}",
            gpus=True,
        )


rule browse:
    input:
        entries="results/features/{run}.jsonl",
        corpus="results/features/{run}.json",
        labels=LABELS,
    output:
        page="results/features/{run}.html",
        # Next to the page, which loads it: Snakemake's own report would hold the page alone.
        data=directory("results/features/{run}.files"),
    log:
        "results/logs/browse/{run}.log",
    benchmark:
        "results/benchmarks/browse/{run}.tsv"
    conda:
        "../../envs/report.yaml"
    resources:
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        labels="--labels" if LABELS else "",
        code=code_hash("scripts/browse.py"),
    shell:
        job(
            "browse.py --entries {input.entries} --corpus {input.corpus}"
            " {params.labels} {input.labels} --page {output.page}"
        )


rule plot:
    input:
        evaluation="results/evaluations/{run}.json",
        history="results/saes/{run}/history.json",
    output:
        loss_curves=report(
            "results/plots/{run}.loss_curves.svg",
            caption="../report/loss_curves.rst",
            category="Training",
            labels=caption_labels("loss curves"),
        ),
        density=report(
            "results/plots/{run}.density.svg",
            caption="../report/density.rst",
            category="Features",
            labels=caption_labels("feature density"),
        ),
    log:
        "results/logs/plot/{run}.log",
    benchmark:
        "results/benchmarks/plot/{run}.tsv"
    conda:
        "../../envs/report.yaml"
    resources:
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        code=code_hash("scripts/plot.py"),
    shell:
        job(
            "plot.py --evaluation {input.evaluation} --history {input.history}"
            " --loss-curves {output.loss_curves} --density {output.density}"
        )


rule list_runs:
    # For programs that read all SAEs: a command line has no room for a thousand names.
    input:
        records=expand(MODEL, model_id=PLAN.models),
    output:
        runs="results/runs.txt",
    log:
        "results/logs/list_runs.log",
    localrule: True
    params:
        names=for_all_runs(["{run}"]),
    run:
        write_lines(output.runs, log[0], params.names)


rule summarise:
    input:
        runs="results/runs.txt",
        tokens=lambda wildcards: tokens_of(next(iter(PLAN.models.values()))),
        records=expand(MODEL, model_id=PLAN.models),
        evaluations=for_all_runs(["results/evaluations/{run}.json"]),
        weights=for_all_runs(["results/saes/{run}/weights.pt"]),
        configs=for_all_runs(["results/saes/{run}/config.json"]),
        histories=for_all_runs(["results/saes/{run}/history.json"]),
        features=for_all_runs(["results/features/{run}.json"]),
    output:
        summary=report(
            "results/summary.csv",
            caption="../report/summary.rst",
            category="Summary",
            labels={"SAE": "all", "plot": "table"},
        ),
        loss_recovered=report(
            "results/plots/l0_against_loss_recovered.svg",
            caption="../report/pareto.rst",
            category="Summary",
            labels={"SAE": "all", "plot": "L0 against loss recovered"},
        ),
        fvu=report(
            "results/plots/l0_against_fvu.svg",
            caption="../report/fvu.rst",
            category="Summary",
            labels={"SAE": "all", "plot": "L0 against FVU"},
        ),
        page=report(
            "results/report.html",
            caption="../report/page.rst",
            category="Summary",
            labels={"SAE": "all", "plot": "page"},
        ),
    log:
        "results/logs/summarise.log",
    benchmark:
        "results/benchmarks/summarise.tsv"
    conda:
        "../../envs/report.yaml"
    resources:
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        results=subpath(output.page, parent=True),
        code=code_hash("scripts/summarise.py"),
    shell:
        job(
            "summarise.py --runs {input.runs} --results {params.results}"
            " --tokens {input.tokens} --records {input.records} --summary {output.summary}"
            " --loss-recovered {output.loss_recovered} --fvu {output.fvu} --report {output.page}"
        )
