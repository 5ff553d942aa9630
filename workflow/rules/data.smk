# Chapters -> one JSON list of texts.


rule process:
    input:
        chapters=PLAN.chapters(),
    output:
        texts=TEXTS,
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
