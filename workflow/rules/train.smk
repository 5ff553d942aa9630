# Activations -> one SAE directory. The end-to-end phase also runs the language model.


rule train:
    input:
        tokens=tokens,
        record=model_record,
        shards=shards,
        origin=origin_files,
    output:
        **{Path(path).stem: path for path in SAE_FILES},
    log:
        "results/logs/train/{run}.log",
    benchmark:
        "results/benchmarks/train/{run}.tsv"
    conda:
        with_torch("train")
    threads: 8
    resources:
        gpu=lambda wildcards: model_plan(wildcards).runtime.gpus,
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        folder=subpath(output.weights, parent=True),
        results=subpath(output.weights, ancestor=3),
        origin=origin_hashes,
        options=lambda wildcards: PLAN.train_options(run_plan(wildcards)),
        runtime=not_recorded(lambda wildcards: PLAN.train_runtime(model_plan(wildcards))),
        code=code_of_run("scripts/train.py"),
    shell:
        job(
            "train.py --tokens {input.tokens} --record {input.record}"
            " --shards {input.shards} {params.options} {params.runtime}"
            " --gpus {resources.gpu}"
            " --checkpoints {params.results}/checkpoints/{wildcards.run} --output {params.folder}",
            gpus=True,
        )
