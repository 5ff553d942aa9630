# Chapters -> one JSON list of texts, and beside it where each is from.


rule process:
    input:
        chapters=PLAN.chapters(),
    output:
        texts=TEXTS,
        sources=SOURCES,
    log:
        "results/logs/process.log",
    benchmark:
        "results/benchmarks/process.tsv"
    conda:
        "../../envs/data.yaml"
    params:
        options=PLAN.process_options(),
        code=code_hash("scripts/process.py"),
    shell:
        "python $SCRIPTS/process.py {params.options} --output {output.texts} > {log} 2>&1"
