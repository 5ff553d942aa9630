# An SAE and its evaluation -> the Hub, and a marker file. Only with `upload_to_hf`. The
# submit node uploads, because it has the network and the login.


rule upload:
    input:
        **{Path(path).stem: path for path in SAE_FILES},
        evaluation="results/evaluations/{run}.json",
        features="results/features/{run}.csv",
        labels=LABELS,
    output:
        marker="results/uploads/{run}.json",
    log:
        "results/logs/upload/{run}.log",
    benchmark:
        "results/benchmarks/upload/{run}.tsv"
    localrule: True
    conda:
        "../../envs/publish.yaml"
    resources:
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        folder=subpath(input.weights, parent=True),
        results=subpath(input.weights, ancestor=3),
        options=lambda wildcards: PLAN.upload_options(model_plan(wildcards)),
        labels="--labels" if LABELS else "",
        tracking=not_recorded(lambda wildcards: PLAN.tracking_options()),
        code=code_of_run("scripts/upload.py"),
    shell:
        job(
            "upload.py --sae {params.folder} --evaluation {input.evaluation}"
            " --features {input.features} {params.labels} {input.labels} {params.options} {params.tracking}"
            " --checkpoints {params.results}/checkpoints/{wildcards.run} --marker {output.marker}"
        )
