# An SAE's features -> labels by a language model, with scores. Only with `label_features`. The submit
# node asks an endpoint, because it has the network and the key; a local model is a job with a GPU.
# The answers are no declared output: Snakemake deletes those, and what was answered is kept.


rule label:
    input:
        entries="results/features/{run}.jsonl",
    output:
        labels="results/labels/{run}.jsonl",
        table="results/labels/{run}.csv",
    log:
        "results/logs/label/{run}.log",
    benchmark:
        "results/benchmarks/label/{run}.tsv"
    localrule: PLAN.labelling.labeller_backend == "endpoint"
    conda:
        "../../envs/label.yaml"
    resources:
        gpu=int(PLAN.labelling.labeller_backend == "local"),
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        folder=subpath(output.labels, parent=True),
        options=lambda wildcards: PLAN.label_options(),
        runtime=not_recorded(lambda wildcards: PLAN.label_runtime(model_plan(wildcards))),
        code=code_hash("scripts/label.py"),
    shell:
        job(
            "label.py --entries {input.entries} {params.options} {params.runtime}"
            " --answers {params.folder}/answers/{wildcards.run}.jsonl"
            " --labels {output.labels} --table {output.table}",
            gpus=PLAN.labelling.labeller_backend == "local",
        )
