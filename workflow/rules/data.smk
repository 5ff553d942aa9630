# Chapters -> one JSON list of texts, and beside it where each is from.


rule process:
    input:
        # Read where they lie, whatever storage and prefix the results have.
        chapters=[local(str(path)) for path in PLAN.chapters()],
    output:
        texts=TEXTS,
        sources=SOURCES,
    log:
        "results/logs/process.log",
    benchmark:
        "results/benchmarks/process.tsv"
    conda:
        "../../envs/data.yaml"
    resources:
        scripts=SCRIPTS,
        attempt=attempt_number,
    params:
        # A function: braces in a subject's name are no pattern then.
        options=lambda wildcards: PLAN.process_options(),
        code=code_hash("scripts/process.py"),
    shell:
        job("process.py {params.options} --output {output.texts}")
