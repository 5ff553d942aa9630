# The configuration, resolved by sae_core.workflow.workflow_config, and the functions that rules call.

import sys
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

# This repository's root, wherever Snakemake runs, and also when another workflow uses this one.
ROOT = Path(str(workflow.current_basedir)).parents[1]
if not (ROOT / "sae_core").is_dir():
    raise WorkflowError(
        f"{workflow.current_basedir}: this workflow brings a Python package along, and has to be on "
        "disk: clone the repository, and name workflow/Snakefile by its path"
    )
if set("{}") & set(str(ROOT)):
    raise WorkflowError(f"{ROOT}: Snakemake takes braces for a pattern; rename the folder")
sys.path.insert(0, str(ROOT))

from sae_core.utils.attempts import forget_failures
from sae_core.utils.code_hash import code_hash
from sae_core.labelling.config import check_labelling
from sae_core.workflow.config_files import read_config
from sae_core.data_processing.sources import sources_path
from sae_core.models.model_sources import ModelRecord
from sae_core.utils.errors import SAEError
from sae_core.utils.gpu_lease import share_gpus
from sae_core.workflow.job_lines import JobLines
from sae_core.model_training.one_run import check_services
from sae_core.utils.naming import EXPORT_FILES
from sae_core.workflow.plan_tables import Tables, corpus_tokens, downloads, sufficiency
from sae_core.workflow.preflight import check_excluded_tokens, check_inputs
from sae_core.workflow.slurm import wait_for_jobs
from sae_core.workflow.streams import notes, sae_options, settings_sha256, streams
from sae_core.workflow.workflow_config import check_run_names, load_plan, save_config
from sae_core.workflow.workflow_lock import record_holder

try:
    # Snakemake has read the files too, but it keeps the second of two equal keys and reads `no` as
    # False. The `config:` of another workflow is used unchanged.
    if not workflow.modifier.skip_configfile:
        config = read_config(map(Path, workflow.configfiles), workflow.config_settings.config)
    PLAN = load_plan(config, ROOT / "workflow/schemas/config.schema.yaml")
    CORPUS_FILES = PLAN.corpus_files()
except SAEError as error:
    raise WorkflowError(str(error))

TEXTS = "results/data/processed_textbooks_all.json"
SOURCES = str(sources_path(Path(TEXTS)))
MODEL = "results/models/{model_id}.json"
TOKENS = "results/tokens/{tokenizer}"
CONFIG = "results/config.yaml"
# What is tokenised, read from where it is, whatever storage and prefix the results have.
TO_TOKENIZE = (
    {"texts": TEXTS, "sources": SOURCES}
    if PLAN.corpus is None
    else {"files": [local(str(path)) for path in CORPUS_FILES]}
)
SAE_FILES = [f"results/saes/{{run}}/{name}" for name in EXPORT_FILES]
UPLOADS = ["results/uploads/{run}.json"] if PLAN.publishing.upload_to_hf else []
LABELS = ["results/labels/{run}.jsonl"] if PLAN.labelling.label_features else []
FEATURES = [
    f"results/features/{{run}}.{kind}" for kind in ("jsonl", "csv", "json", "html", "files")
]
PLOTS = ["results/plots/{run}.loss_curves.svg", "results/plots/{run}.density.svg"]

job_lines = None  # turns Snakemake's console into one line per job, from `begin` on


wildcard_constraints:
    model_id="|".join(map(re.escape, PLAN.models)),
    tokenizer="[0-9a-f]+",
    run=r"[^/]+",
    hook_name=r"\w[\w.-]*",
    batch=r"(\d+|middle)(\+(\d+|middle))*",
    shard=r"\d+",
    stream="[0-9a-f]{12}",


def with_torch(family):
    """The environment of rules with torch. For `auto`, conda chooses a build that fits the
    machine on which it creates the environment."""
    build = {"cpu": "-cpu", "cuda": "-cuda"}.get(PLAN.runtime.device, "")
    return f"../../envs/{family}{build}.yaml"


def check_before_any_job():
    """Errors that a dry run also finds: chapters, models or layers that do not exist."""
    record = str(rules.fetch.output.record)  # with the prefix of another workflow
    try:
        check_inputs(PLAN, lambda name: Path(record.replace("{model_id}", name)))
    except SAEError as error:
        raise WorkflowError(str(error))


def say_costs():
    """A message while models have to be downloaded, also in a dry run."""
    download = downloads(PLAN, Tables.load(ROOT / "config/planning.yaml"), Path(MODEL).parent)
    if download:
        logger.info(f"{download}\n{sufficiency(corpus_tokens(PLAN))}")


def job(command, gpus=False):
    """The shell of a rule: one of the scripts. With `gpus`, it is told how many Snakemake grants it.

    What a user has to fix is not tried again: the attempt before has left its error next to the log,
    which Snakemake removes. The job's error stream is its log; stream 3 is Snakemake's, for an error
    that the log cannot take. `exec` puts the job in the shell's place: it gets signals, and learns of
    Snakemake's death.
    """
    return (
        "if [ {resources.attempt} -gt 1 ] && [ -e {log}.error ]; then"
        " cat {log}.error > {log}; exit 1; fi; rm -f {log}.error;"
        f" {'SAE_CORE_GPUS={resources.gpu} ' if gpus else ''}SAE_CORE_ERROR={{log}}.error"
        " SAE_CORE_CONSOLE=/proc/$$/fd/3"
        f" exec python {{params.scripts:q}}/{command} 3>&2 > {{log}} 2>&1"
    )


def attempt_number(wildcards, attempt):
    """The number of the attempt at a job, counted from 1. It is no resource, but Snakemake passes it
    to resources only."""
    return attempt


def not_recorded(value):
    """A function for params, which returns what `value` does for a job's wildcards: a change of it
    re-runs nothing. Snakemake does not record a param that follows from the job's resources, and
    takes every function that asks for them to be one."""
    return lambda wildcards, resources: value(wildcards)


SCRIPTS = not_recorded(lambda wildcards: str(ROOT / "scripts"))


def begin():
    """Before the first job: check what can fail without one, and record this process."""
    global job_lines
    settings = workflow.output_settings
    if not (settings.verbose or settings.printshellcmds):
        job_lines = JobLines.take_over(
            logger, lambda: (workflow.scheduler.finished_jobs, len(workflow.dag))
        )
    try:
        record_holder()
        forget_failures(Path("results/logs"))
        if "gpu" in workflow.global_resources:
            share_gpus(workflow.global_resources["gpu"].value)
        # Check that W&B and the Hub will accept what the jobs send.
        check_services(PLAN.tracking, PLAN.publishing)
        check_labelling(PLAN.labelling, PLAN.asking)
        if workflow.executor_plugin.name == "slurm":
            # Wait for jobs that a killed Snakemake left behind and that write the same files.
            wait_for_jobs(Path.cwd(), rules_to_run())
        save_config(PLAN.config, Path(CONFIG))
    except SAEError as error:
        raise WorkflowError(str(error))


def rules_to_run():
    """The names of the rules whose jobs this run has before it. Snakemake has no documented way."""
    return {job.rule.name for job in workflow.dag.needrun_jobs()}


def end(logs):
    """After the last job, or a failure."""
    if job_lines:
        job_lines.end(logs)


def depth(model):
    """The model's number of layers, if its settings need it: `middle` waits for the fetch."""
    if not model.needs_depth:
        return None
    n_layers = fetched(model).n_layers
    try:
        check_run_names(model, n_layers)
    except SAEError as error:
        raise WorkflowError(str(error))
    return n_layers


def for_all_runs(patterns):
    """An input function that fills in the patterns for every SAE of the configuration."""
    return lambda wildcards: [
        pattern.format(run=run.name)
        for model in PLAN.models.values()
        for run in model.runs(depth(model))
        for pattern in patterns
    ]


def write_lines(path, log, lines):
    """One line per item, and their number in the log."""
    Path(path).write_text("".join(f"{line}\n" for line in lines))
    Path(log).write_text(f"{path}: {len(lines)} lines\n")


def model_plan(wildcards):
    """The plan of the model that a job is about."""
    if "run" in wildcards.keys():
        return PLAN.model_of(wildcards.run)
    return PLAN.models[wildcards.model_id]


def run_plan(wildcards):
    """The plan of the SAE that a job is about."""
    return PLAN.run(wildcards.run, depth(PLAN.model_of(wildcards.run)))


def code_of_run(script):
    """A function for params: the hash of the code that a job about one SAE runs."""
    return lambda wildcards: code_hash(script, sae_type=run_plan(wildcards).sae.sae_type)


def model_record(wildcards):
    """The record of the model that an SAE belongs to."""
    return MODEL.format(model_id=model_plan(wildcards).model_id)


def fetched(model):
    """The record of a model, once there is one."""
    file = checkpoints.fetch.get(model_id=model.model_id).output.record
    with file.open():  # brings it here from a storage
        record = ModelRecord.load(Path(file))
    try:
        check_excluded_tokens(model, record)
    except SAEError as error:
        raise WorkflowError(str(error))
    return record


def tokens(wildcards):
    """The tokenised texts for a job about a model."""
    return tokens_of(model_plan(wildcards))


def tokens_of(model):
    """The tokenised texts for a model."""
    return TOKENS.format(tokenizer=fetched(model).tokenizer_id)


def record_file(model):
    """The file of a model's record, fetched or not."""
    return rules.fetch.output.record.apply_wildcards({"model_id": model.model_id})


def bring_records(wildcards):
    """An input function without files: it brings the records that `tokenizer_options` reads here
    from a storage. As inputs, the records of further models would have texts tokenised again."""
    for model in PLAN.models.values():
        record = record_file(model)
        if record.is_storage and not Path(record).exists() and record.storage_object.exists():
            with record.open():  # has Snakemake bring it and ask this function again
                pass
    return []


def tokenizer_options(wildcards):
    """Where a tokenizer is: in the folder of a model that has been fetched and has it."""
    for model in PLAN.models.values():
        path = Path(record_file(model))
        if path.is_file():
            record = ModelRecord.load(path)
            if record.tokenizer_id == wildcards.tokenizer:
                return PLAN.tokenizer_options(model, record)
    raise WorkflowError(f"{wildcards.tokenizer}: the tokenizer of no model; fetch the models again")


def shards(wildcards):
    """The activations that an SAE is trained on, one folder per harvest job."""
    run = run_plan(wildcards)
    folder = f"{run.model.model_id}/{run.model.hook.label}"
    harvests = Path(rules.harvest.output.receipt).parents[3]  # also under another workflow's prefix
    receipts = (harvests / folder).glob("*/0.json")
    return expand(
        "results/activations/{folder}/{batch}/{shard}",
        folder=folder,
        batch=run.model.batch_of(run.label, [path.parent.name for path in receipts]),
        shard=range(PLAN.harvest.harvest_jobs),
    )


@cache
def streams_of(model_id):
    """The SAEs of a model by stream, as it is when they are first asked for: a stream that ends does
    not change it."""
    results = Path(rules.stream.output.saes).parents[1]  # also under another workflow's prefix
    folder, weights = results / model_id, str(rules.train.output.weights)

    def is_there(run, stream):
        return Path(weights.replace("{run}", run)).exists() or (folder / stream / run).exists()

    model = PLAN.models[model_id]
    try:
        return streams(PLAN, model, depth(model), notes(folder), is_there)
    except SAEError as error:
        raise WorkflowError(str(error))


@cache
def stream_by_run(model_id):
    """The stream of each SAE of a model, by run name."""
    return {run.name: stream for stream, runs in streams_of(model_id).items() for run in runs}


def stream_runs(wildcards):
    """The SAEs of a stream."""
    return streams_of(wildcards.model_id)[wildcards.stream]


def stream_of_run(wildcards):
    """The folder in which a stream leaves an SAE and others."""
    model = model_plan(wildcards)
    model_id = model.model_id
    return f"results/streams/{model_id}/{stream_by_run(model_id)[wildcards.run]}"


def stream_origins(wildcards):
    """The files of the SAEs that trainings of a stream begin with, as `origin_files`."""
    model = model_plan(wildcards)
    origins = {model.origin_run(run, depth(model)) for run in stream_runs(wildcards)}
    return expand(SAE_FILES[:2], run=sorted(filter(None, origins)))


def origin_files(wildcards):
    """The files of the SAE that a training begins with, if this configuration makes that one too."""
    run = run_plan(wildcards)
    origin = run.model.origin_run(run, depth(run.model))
    return expand(SAE_FILES[:2], run=origin) if origin else []


def origin_hashes(wildcards):
    """The hashes of these files, if they are on this disk and the configuration does not make them."""
    return "" if origin_files(wildcards) else str(run_plan(wildcards).origin_sha256)


def batch_hooks(wildcards):
    """The hooks that a harvest job reads."""
    model = model_plan(wildcards)
    return model.hook_specs(wildcards.batch, depth(model))


def caption_labels(plot):
    """The title of a plot in Snakemake's report."""
    return {"SAE": "{run}", "plot": plot}
