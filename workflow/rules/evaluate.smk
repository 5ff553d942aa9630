# SAE directories -> evaluations, plots, the summary and the page.


rule evaluate:
    input:
        texts=TEXTS,
        record=model_record,
        weights="results/saes/{run}/weights.pt",
        config="results/saes/{run}/config.json",
    output:
        evaluation="results/evaluations/{run}.json",
    log:
        "results/logs/evaluate/{run}.log",
    benchmark:
        "results/benchmarks/evaluate/{run}.tsv"
    conda:
        with_torch("evaluate")
    threads: 8
    resources:
        gpu=1,
        # What changes no result stands here, not in params: a change of it reruns nothing.
        scripts=SCRIPTS,
        device=PLAN.runtime.device,
        batch_size=lambda wildcards: model_plan(wildcards).runtime.batch_size,
        tracking=PLAN.tracking_options(),
    params:
        folder=subpath(input.weights, parent=True),
        results=subpath(input.weights, ancestor=3),
        options=lambda wildcards: PLAN.evaluate_options(model_plan(wildcards)),
        code=code_hash("scripts/evaluate.py"),
    shell:
        "python {resources.scripts:q}/evaluate.py --sae {params.folder} --texts {input.texts}"
        " --record {input.record} {params.options} --batch-size {resources.batch_size} --device {resources.device}"
        " {resources.tracking} --checkpoints {params.results}/checkpoints/{wildcards.run}"
        " --output {output.evaluation} > {log} 2>&1"


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
        scripts=SCRIPTS,
    params:
        code=code_hash("scripts/plot.py"),
    shell:
        "python {resources.scripts:q}/plot.py --evaluation {input.evaluation} --history {input.history}"
        " --loss-curves {output.loss_curves} --density {output.density} > {log} 2>&1"


rule summarise:
    input:
        evaluations=for_all_runs(["results/evaluations/{run}.json"]),
        histories=for_all_runs(["results/saes/{run}/history.json"]),
    output:
        summary=report(
            "results/summary.csv",
            caption="../report/summary.rst",
            category="Summary",
            labels={"SAE": "all", "plot": "table"},
        ),
        pareto=report(
            "results/plots/l0_against_loss_recovered.svg",
            caption="../report/pareto.rst",
            category="Summary",
            labels={"SAE": "all", "plot": "L0 against loss recovered"},
        ),
        page="results/report.html",
    log:
        "results/logs/summarise.log",
    benchmark:
        "results/benchmarks/summarise.tsv"
    conda:
        "../../envs/report.yaml"
    resources:
        scripts=SCRIPTS,
    params:
        code=code_hash("scripts/summarise.py"),
    shell:
        "python {resources.scripts:q}/summarise.py --evaluations {input.evaluations}"
        " --histories {input.histories} --summary {output.summary} --pareto {output.pareto}"
        " --report {output.page} > {log} 2>&1"
