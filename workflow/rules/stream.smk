# Texts -> several SAE directories, with no activations on disk: one pass of the model feeds all SAEs of
# a batch of layers. In place of activations.smk and train.smk with `harvest: {store: false}`.


rule stream:
    input:
        tokens=tokens,
        record=MODEL,
        origins=stream_origins,
    output:
        saes=temp(directory("results/streams/{model_id}/{stream}")),
    log:
        "results/logs/stream/{model_id}.{stream}.log",
    benchmark:
        "results/benchmarks/stream/{model_id}.{stream}.tsv"
    conda:
        with_torch("train")
    threads: 8
    resources:
        gpu=1,
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        notes=subpath(output.saes, parent=True),
        results=subpath(output.saes, ancestor=3),
        options=lambda wildcards: PLAN.stream_options(model_plan(wildcards)),
        # Not recorded: what is left of a stream is not trained again when one of its SAEs changes.
        saes=not_recorded(lambda wildcards: [sae_options(run) for run in stream_runs(wildcards)]),
        settings=not_recorded(
            lambda wildcards: [settings_sha256(PLAN, run) for run in stream_runs(wildcards)]
        ),
        runtime=not_recorded(lambda wildcards: PLAN.train_runtime(model_plan(wildcards))),
        code=code_hash("scripts/stream.py"),
    shell:
        job(
            "stream.py --tokens {input.tokens} --record {input.record} {params.options}"
            " --saes {params.saes:q} --settings {params.settings} {params.runtime}"
            " --checkpoints {params.results}/checkpoints --output {output.saes}"
            " --finished {params.results}/saes --notes {params.notes} --stream {wildcards.stream}",
            gpus=True,
        )


rule train:
    input:
        tokens=tokens,
        record=model_record,
        saes=stream_of_run,
        origin=origin_files,
    output:
        **{Path(path).stem: path for path in SAE_FILES},
    log:
        "results/logs/train/{run}.log",
    localrule: True
    conda:
        with_torch("train")
    resources:
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        folder=subpath(output.weights, parent=True),
        origin=origin_hashes,
        options=lambda wildcards: PLAN.train_options(run_plan(wildcards)),
        code=code_of_run("scripts/stream.py"),
    shell:
        job("collect.py --sae {input.saes}/{wildcards.run} --output {params.folder}")
