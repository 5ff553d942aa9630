# One pass of the model -> the activations of every layer of a batch. The first batch has all layers
# that SAEs are trained on; a layer that is added later is a separate batch. You may delete the data
# once no more SAEs are to be trained; the receipts record which batch a layer belongs to.


rule harvest:
    input:
        tokens=tokens,
        record=MODEL,
    output:
        receipt="results/harvests/{model_id}/{hook_name}/{batch}/{shard}.json",
        shard=directory("results/activations/{model_id}/{hook_name}/{batch}/{shard}"),
    log:
        "results/logs/harvest/{model_id}.{hook_name}.{batch}.{shard}.log",
    benchmark:
        "results/benchmarks/harvest/{model_id}.{hook_name}.{batch}.{shard}.tsv"
    conda:
        with_torch("train")
    threads: 8
    resources:
        gpu=1,
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        options=lambda wildcards: PLAN.harvest_options(model_plan(wildcards)),
        runtime=not_recorded(lambda wildcards: PLAN.model_runtime(model_plan(wildcards))),
        hooks=batch_hooks,
        jobs=PLAN.harvest.harvest_jobs,
        code=code_hash("scripts/harvest.py"),
    shell:
        job(
            "harvest.py --tokens {input.tokens} --record {input.record}"
            " --hooks {params.hooks} {params.options} --shard {wildcards.shard} --shards {params.jobs}"
            " {params.runtime} --output {output.shard} --receipt {output.receipt}",
            gpus=True,
        )
