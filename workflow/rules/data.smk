# Chapters -> one JSON list of texts, and a second file that says where each text comes from.


rule process:
    input:
        # Read from where they are, whatever storage and prefix the results have.
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
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        # A function, so that braces in a subject's name are not a pattern.
        options=lambda wildcards: PLAN.process_options(),
        code=code_hash("scripts/process.py"),
    shell:
        job("process.py {params.options} --output {output.texts}")
