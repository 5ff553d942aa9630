# Chapters -> one JSON list of texts, and a second file that says where each text comes from -> their
# tokens, once for all models that have the same tokenizer.


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


rule tokenize:
    input:
        **TO_TOKENIZE,
        records=bring_records,
    output:
        tokens=directory(TOKENS),
    log:
        "results/logs/tokenize/{tokenizer}.log",
    benchmark:
        "results/benchmarks/tokenize/{tokenizer}.tsv"
    conda:
        with_torch("train")
    threads: 8
    resources:
        attempt=attempt_number,
    params:
        scripts=SCRIPTS,
        texts=lambda wildcards, input: PLAN.corpus_options(input.get("texts")),
        reading=not_recorded(lambda wildcards: PLAN.corpus_runtime()),
        # Of whichever model: the folder's name is a hash of all that the tokenizer does.
        tokenizer=not_recorded(tokenizer_options),
        code=code_hash("scripts/tokenize_corpus.py"),
    shell:
        job(
            "tokenize_corpus.py {params.texts} {params.reading} {params.tokenizer}"
            " --processes {threads} --output {output.tokens}"
        )
