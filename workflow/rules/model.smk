# A model's name -> its files on this machine, and a record of them. A checkpoint, because the
# number of layers says which one is the middle.


checkpoint fetch:
    output:
        record=MODEL,
    log:
        "results/logs/fetch/{model_id}.log",
    benchmark:
        "results/benchmarks/fetch/{model_id}.tsv"
    localrule: True
    conda:
        with_torch("train")
    resources:
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        options=lambda wildcards: PLAN.fetch_options(model_plan(wildcards)),
        code=code_hash("scripts/fetch.py"),
    shell:
        job("fetch.py {params.options} --output {output.record}")
