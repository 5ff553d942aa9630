# One pass of the model -> the activations of every layer of a batch: at first all layers that SAEs
# are trained on; a layer that is added later is a batch of its own. The data may be deleted when no
# SAE is to come; the receipts tell which batch a layer belongs to.


rule harvest:
    input:
        texts=TEXTS,
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
        # What changes no result stands here, not in params: a change of it reruns nothing.
        scripts=SCRIPTS,
        attempt=attempt_number,
        device=PLAN.runtime.device,
        batch_size=lambda wildcards: model_plan(wildcards).runtime.batch_size,
    params:
        options=lambda wildcards: PLAN.harvest_options(model_plan(wildcards)),
        hooks=batch_hooks,
        jobs=PLAN.harvest.harvest_jobs,
        code=code_hash("scripts/harvest.py"),
    shell:
        job(
            "harvest.py --texts {input.texts} --record {input.record}"
            " --hooks {params.hooks} {params.options} --shard {wildcards.shard} --shards {params.jobs}"
            " --batch-size {resources.batch_size} --device {resources.device}"
            " --output {output.shard} --receipt {output.receipt}"
        )
