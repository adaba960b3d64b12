"""What the verbs say of themselves; imports nothing heavy, so that help answers at once."""

from metalearn import __version__

MAIN = f"""metalearn {__version__}: few-shot and meta-learning experiments

usage: metalearn <verb> [key=value …]

  train      meta-train, meta-validate, meta-test:   metalearn train algo=maml dataset=omniglot
  evaluate   test a trained run again:               metalearn evaluate run=<folder> episode.shot=5
  compare    runs in one table, with significance:   metalearn compare <folder> <folder>
  reproduce  train and hold against a paper:         metalearn reproduce maml_omniglot_5w1s budget=quick
  resume     go on with a run that was stopped:      metalearn resume <folder>
  list       algorithms, data sets, backbones, experiments
  doctor     versions, device, data, a self-test: what to paste into a bug report

  metalearn <verb> --help    explains the verb
  --debug                    shows the traceback of an error
  --version                  prints the version
"""

#: Families of algorithms, as `metalearn list` groups them.
FAMILIES = {
    "gradient": "gradient-based: adapt weights by gradient steps",
    "metric": "metric: compare with the support set in an embedding",
    "memory": "memory and weights written from the support set",
    "transfer": "transfer baselines: trained on ordinary batches",
}

TRAIN = """metalearn train [key=value …] [-m] [--cfg job]

Meta-trains, keeps the best checkpoint by validation, tests it once, and writes everything into its run folder.

  metalearn train algo=maml dataset=omniglot             a method on a data set, with the settings that suit both
  metalearn train algo=protonet dataset=glyphs           embedded data, no download
  metalearn train algo=maml algo.inner_lr=0.1 train.steps=2000 seed=1
  metalearn train -m algo=maml,protonet episode.shot=1,5 seed=0,1     all combinations, one table at the end

choose
{groups}
often changed
  episode.way=5 episode.shot=1 episode.query=15   validation and test; episode.train.way|shot|query: training
  statistics=query|support|support_plus_one|population   normalisation at prediction (query is transductive)
  train.steps=10000 train.meta_batch=32 train.lr=0.001 train.schedule=cosine train.patience=10
  val.every=500 val.episodes=300 test.episodes=1000
  seed=0 episode_seed=1 device=auto|cpu|cuda data_dir=… cache_dir=…
  optimiser=sgd optimiser.momentum=0.9 optimiser.weight_decay=5e-4 augment=crop_flip loss=label_smoothing
  hydra.run.dir=my/folder                         the run folder
  resume=auto                                     go on with what lies there, or show it again if it is finished

options
  plugins=[package]    a package whose methods and data may be used, where it is not an installed plugin; for every command
  -m, --multirun       every combination of comma-separated values, each in its own folder
  --cfg job            print the composed configuration and stop
  --config-dir DIR     also look for configuration files in DIR
  -sc install=bash     shell completion: eval "$(metalearn -sc install=bash)"
  --debug              show the traceback of an error
"""

EVALUATE = """metalearn evaluate run=<folder> [key=value …] [split=train|val|test] [curve=shot|steps]

Tests the best checkpoint of a finished run under its own or a changed protocol, with transductive and with inductive
statistics and their paired difference, and writes evaluations/<protocol_id>.json into the run folder.

  metalearn evaluate run=outputs/maml-omniglot/<time>
  metalearn evaluate run=… episode.shot=5 episode.query=1 test.episodes=600
  metalearn evaluate run=… statistics=support_plus_one       one query at a time
  metalearn evaluate run=… algo.test_inner_steps=10          more adaptation
  metalearn evaluate run=… dataset=glyphs                    another data set
  metalearn evaluate run=… split=train                       how well it knows the classes it was trained on
  metalearn evaluate run=… curve=shot                        accuracy over shots: table, CSV and PNG
  metalearn evaluate run=… curve=steps                       accuracy over inner steps 0 to 10
"""

COMPARE = """metalearn compare <folder> … [out=<folder>]

One table over runs, their evaluations, and the runs of multirun folders. Only figures of equal protocols share a column;
runs that differ in their seed alone share a line. Differences are tested on the shared episodes.
Writes comparison.md, .csv and .png into `out`, or else into the folder where only one is named, or else into
outputs/compare/<time>.

  metalearn compare outputs/multirun/<time>
  metalearn compare outputs/maml-omniglot/<time> outputs/protonet-omniglot/<time>
"""

REPRODUCE = """metalearn reproduce <experiment> [budget=smoke|quick|paper] [seed=…] [key=value …]

Trains and tests the recipe of a published result, and ends with PASS or FAIL (exit code 0 or 1). At budget=paper (the
default, hours on a CPU) the published result counts, at smaller budgets the recipe's own measured one; a budget that was
not measured with this version of the episode sampler ends with NOT MEASURED (exit code 3).

{experiments}
"""

RESUME = """metalearn resume <folder>

Goes on with a run that was stopped, from its last whole checkpoint, and ends just as if it had never been stopped; shows the
result again if it is finished. The same as its command with hydra.run.dir=<folder> resume=auto.
A multirun is gone on with by its own command with the same hydra.sweep.dir.
"""

DOCTOR = """metalearn doctor [data_dir=…] [cache_dir=…] [device=auto|cpu|cuda]

Prints versions, device, free disk, which data sets are there, what Weights & Biases would do, and the outcome of a self-test of some
ten seconds. Exit code 1 where that fails. Paste it into a bug report.
"""
