# Activations -> one SAE directory. The end-to-end phase also runs the language model.


rule train:
    input:
        texts=TEXTS,
        record=model_record,
        shards=shards,
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
        # Settings that change no result are here, not in params: changing them re-runs nothing.
        scripts=SCRIPTS,
        attempt=attempt_number,
        device=PLAN.runtime.device,
        batch_size=lambda wildcards: model_plan(wildcards).runtime.batch_size,
        activation_batch_size=lambda wildcards: model_plan(wildcards).runtime.activation_batch_size,
        log_freq=PLAN.runtime.log_freq,
        checkpoint_freq=PLAN.runtime.checkpoint_freq,
        resume_minutes=str(PLAN.runtime.resume_minutes),
        max_skipped=PLAN.runtime.max_skipped,
        tracking=PLAN.tracking_options(),
    params:
        folder=subpath(output.weights, parent=True),
        results=subpath(output.weights, ancestor=3),
        options=lambda wildcards: PLAN.train_options(run_plan(wildcards)),
        code=code_of_run("scripts/train.py"),
    shell:
        job(
            "train.py --texts {input.texts} --record {input.record}"
            " --shards {input.shards} {params.options} --device {resources.device} --gpus {resources.gpu}"
            " --batch-size {resources.batch_size}"
            " --activation-batch-size {resources.activation_batch_size}"
            " --log-freq {resources.log_freq} --checkpoint-freq {resources.checkpoint_freq}"
            " --resume-minutes {resources.resume_minutes} --max-skipped {resources.max_skipped}"
            " {resources.tracking}"
            " --checkpoints {params.results}/checkpoints/{wildcards.run} --output {params.folder}"
        )
