"""CIFAR-100: train any row of the Exit-Ensemble Distillation paper's Tables I, II and IV, one CSV row for each run.

    python benchmarks/cifar100.py --data CIFAR100 --recipe plain,joint_ce,eed_mse,eed_kl --seeds 0,1,2      # train
    python benchmarks/cifar100.py --table 1                                          # published beside ours
    python benchmarks/cifar100.py --summary                                          # means and paired differences

CIFAR100 is a folder with the original pickles, with fastai's image folders, or with one sheet of 32×32 tiles for each
class. Every row trains through `Learner(dls, multi_exit(…), cbs=EEDCallback(…))`; the recipe 'plain' is the same
network and Learner without the callback. A run that is there already is not run again, and one that was cut off goes
on from its checkpoint.

Two protocols, named in the row:
  select   45,000 images train and the 5,000 validation tiles judge; the test images are not touched. For choosing
           settings.
  report   settings are frozen, all 50,000 train, and the last epoch is the figure. The test curve is recorded for the
           paper's Figs. 3 and 5. The best epoch, as the paper selects, has a column of its own and chooses nothing.

`cifar100_data.py` reads the images; `cifar100_tables.py` has the columns of a row and the paper's tables.
"""

import hashlib, platform, random, subprocess, sys
from importlib.metadata import version

from fastai.vision.all import *
from fastcore.script import *

from cifar100_data import *
from cifar100_tables import *
from eed_fastai import models as eed_models
from eed_fastai.all import *

commit = checkout(here)
all_recipes = {name: recipe for name, recipe in recipes.items() if recipe.get('teacher') is not ExternalTeacher}
all_recipes |= subset_recipes()

# --- callbacks --------------------------------------------------------------------------------------------------------

class Checkpoint(Callback):
    "Every `every` epochs, write all that a run needs to go on"
    order = Recorder.order+1

    def __init__(self, file, every):
        store_attr()
        self.rows = []
        self.before = 0.        # seconds trained before the cut
        self.smooth = None      # count and value of the smoothed loss at the cut

    def state(self):
        "Weights, optimizer, rows so far, and every source of random numbers"
        smooth = self.recorder.smooth_loss
        rng = torch.get_rng_state(), np.random.get_state(), random.getstate(), self.dls.train.rng.getstate()
        return dict(
            model=unwrap(self.learn.model).state_dict(),
            opt=self.learn.opt.opt.state_dict(),
            rows=self.rows,
            seconds=self.seconds,
            smooth=(smooth.count, smooth.val),
            rng=rng,
            cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        )

    def load(self, learn):
        "Put `learn` where the file left it; the epoch to go on with"
        if not self.file.exists():
            return 0
        state = torch.load(self.file, map_location='cpu', weights_only=False)
        unwrap(learn.model).load_state_dict(state['model'])
        learn.opt.opt.load_state_dict(state['opt'])
        self.set_random_state(state, learn.dls)
        self.rows = state['rows']
        self.before = state['seconds']
        self.smooth = state['smooth']
        return len(self.rows)

    def set_random_state(self, state, dls):
        "Let every source of random numbers go on from where it was"
        of_torch, of_numpy, of_python, of_loader = state['rng']
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
        dls.train.rng.setstate(of_loader)
        if state['cuda'] is not None:
            torch.cuda.set_rng_state(state['cuda'])

    @property
    def seconds(self):
        "Seconds trained so far, those before a cut included"
        return self.before + time.perf_counter() - self.start

    def before_fit(self):
        "Start the clock, and give the Recorder its smoothed loss back"
        self.start = time.perf_counter()
        if self.smooth:
            self.recorder.smooth_loss.count, self.recorder.smooth_loss.val = self.smooth

    def after_epoch(self):
        "Keep the epoch's row; write the file when its turn comes"
        if self.epoch<len(self.rows):       # trained before the cut, and skipped now
            return
        values = dict(zip(self.recorder.metric_names[:-1], self.recorder.log[:-1]))
        self.rows.append(dict(values, seconds=round(self.seconds, 2)))
        done = len(self.rows)
        if done%self.every==0 and done<self.n_epoch:
            write_whole(self.file, partial(torch.save, self.state()))

class JudgeEvery(Callback):
    "Validate after every `n`-th epoch and the last one only"
    def __init__(self, n): self.n = n

    def before_validate(self):
        "Skip the validation unless it is its turn"
        epoch = self.epoch+1
        if epoch%self.n and epoch<self.n_epoch:
            raise CancelValidException

# --- training ---------------------------------------------------------------------------------------------------------

# Shares of the training after which the rate is divided by 10: EED's code; MSDNet's and IMTA's
steps = {'paper': (75/200, 130/200, 180/200), 'imagenet': (30/90, 60/90)}

def step_lr(lr, at, pct):
    "The learning rate when the share `pct` of the training is over"
    return lr * 0.1**sum(pct>=o for o in at)

def sgd(params, **kw):
    "SGD with momentum 0.9, as fastai takes an optimizer"
    return OptimWrapper(params, torch.optim.SGD, momentum=0.9, **kw)

def make_learner(o, dls, arch):
    "The Learner of a run; 'plain' has heads as well, so that a seed gives the same body and the same batches"
    set_seed(o.seed)
    recipe = all_recipes[o.recipe]
    model = multi_exit(arch, n_out=dls.c, head=recipe.head)
    cbs = [] if o.recipe=='plain' else EEDCallback(**recipe)
    opt_func = partial(sgd, nesterov=o.nesterov)
    learn = Learner(dls, model, opt_func=opt_func, lr=o.lr, wd=o.wd, wd_bn_bias=True, metrics=accuracy, cbs=cbs)
    if o.channels_last:
        learn.add_cb(ChannelsLast())
    if o.amp=='bf16':
        learn.to_bf16()
    if o.amp=='fp16':
        learn.to_fp16()
    if o.compile:
        learn.model.compile()
    return learn

def fit(learn, o, checkpoint):
    "Train by the schedule, from the checkpoint if there is one"
    learn.create_opt()
    if o.channels_last:
        learn.model.to(memory_format=torch.channels_last)
    start = checkpoint.load(learn)
    if start:
        print(f'{o.run}: goes on after epoch {start}', flush=True)
    cbs = [checkpoint, JudgeEvery(o.judge_every)]
    with learn.no_bar(), learn.no_logging():
        if o.schedule in steps:
            rate = ParamScheduler({'lr': partial(step_lr, o.lr, steps[o.schedule])})
            learn.fit(o.epochs, o.lr, wd=o.wd, cbs=[*cbs, rate], start_epoch=start)
        else:
            learn.fit_one_cycle(o.epochs, o.lr, wd=o.wd, cbs=cbs, start_epoch=start)

# --- judging ----------------------------------------------------------------------------------------------------------

def gather_logits(learn, recipe, dl):
    "Logits of every trained exit and the ensemble, by name, and the classes"
    gather = GatherExits()
    asks_exits = [EEDCallback(alpha=0.)] if recipe=='plain' else []
    with learn.no_bar(), learn.added_cbs(asks_exits):
        learn.get_preds(dl=dl, reorder=False, cbs=gather)
    z = named_logits(torch.cat(gather.zs).cpu(), unwrap(learn.model).exit_names)
    y = torch.cat(gather.ys).cpu()
    if recipe=='plain':
        z = {'main': z['main']}              # its other heads were never trained
    return z, y

def unaugmented_dl(dls):
    "The training images as test images are: none left out, no augmentation"
    return dls.valid.new(dataset=dls.train_ds, shuffle=False, drop_last=False)

def is_right(z, y):
    "Which images are answered right"
    return z.argmax(1)==y

def train_accuracies(learn, recipe):
    "Accuracy of every exit and the ensemble on the training images, in eval mode and without augmentation, in %"
    with learn.dls.train_ds.set_split_idx(1):
        z, y = gather_logits(learn, recipe, unaugmented_dl(learn.dls))
    return {f'train_{name}': round(100*is_right(o, y).float().mean().item(), 4) for name, o in z.items()}

def correct_bits(z, y):
    "Which images each exit and the ensemble get right, packed eight to a byte"
    return {name: np.packbits(is_right(o, y).numpy()) for name, o in z.items()}

def half_logits(z, y):
    "Logits of each exit as float16, and the classes; the ensemble follows from them"
    logits = {name: o.numpy().astype(np.float16) for name, o in z.items() if name!='ensemble'}
    return {'y': y.numpy().astype(np.int16), **logits}

# --- one run ----------------------------------------------------------------------------------------------------------

def joules():
    "Energy that the GPU has used so far, if NVML can be asked"
    try:
        import pynvml
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)/1000
    except Exception:
        return None

# What says where and how often, and changes no figure
no_settings = ('data', 'results', 'every', 'run', 'device', 'judge_every')

def run_name(o):
    "What tells this run from others: the main settings in words, all of them in a few letters"
    settings = {k: v for k, v in vars(o).items() if k not in no_settings}
    letters = hashlib.sha1(repr(sorted(settings.items())).encode()).hexdigest()[:6]
    width = f'-w{o.width}' if o.width else ''
    return f'{o.dataset}-{o.network}{width}-{o.recipe}-{o.protocol}-{o.schedule}{o.epochs}-s{o.seed}-{letters}'

def runs_in(file):
    "Names of the runs that have a row"
    return set(pd.read_csv(file).run) if file.exists() else set()

def best_epoch(curve):
    "The epoch that the paper would have selected, and its accuracy in %"
    return dict(best_epoch=int(curve.accuracy.idxmax()), best_main=round(100*curve.accuracy.max(), 4))

def what_computed():
    "Commit, hardware and versions"
    versions = {name: version(name) for name in ('fastai', 'torchvision', 'eed_fastai')}
    python = platform.python_version()
    return dict(commit=commit, hardware=hardware(), torch=torch.__version__, python=python, **versions)

def what_it_took(checkpoint, joules_before):
    "Seconds, the most memory, and energy"
    energy = None if joules_before is None else round(joules()-joules_before)
    return dict(seconds=round(checkpoint.seconds, 1), peak_memory=peak_memory(), joules=energy)

def write_npz(file, arrays):
    "Write arrays by name to a compressed file"
    with open(file, 'wb') as f:
        np.savez_compressed(f, **arrays)

def write_run(o, curve, z, y):
    "Write a run's curve, which images it gets right, and its logits"
    write_whole(o.results/'history'/f'{o.run}.csv', partial(curve.to_csv, index=False))
    write_whole(o.results/'bits'/f'{o.run}.npz', partial(write_npz, arrays=correct_bits(z, y)))
    write_whole(o.results/'logits'/f'{o.run}.npz', partial(write_npz, arrays=half_logits(z, y)))

def make_folders(results):
    "The folders beside the rows"
    for name in ('history', 'bits', 'logits', 'checkpoints'):
        (results/name).mkdir(parents=True, exist_ok=True)

def train_row(o, name, make_dls, arch):
    "One run, from its settings to its row in `name`.csv"
    o.run = run_name(o)
    file = o.results/f'{name}.csv'
    if o.run in runs_in(file):
        return print(f'{o.run}: there already', flush=True)
    make_folders(o.results)
    joules_before = joules()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    set_seed(o.seed)            # a loader draws its order from a generator that is seeded when it is made
    dls = make_dls()
    learn = make_learner(o, dls, arch)
    checkpoint = Checkpoint(o.results/'checkpoints'/f'{o.run}.pth', o.every)
    fit(learn, o, checkpoint)
    curve = pd.DataFrame(checkpoint.rows).round(5)
    z, y = gather_logits(learn, o.recipe, dls.valid)
    row = {**vars(o), **exit_scores(z, y), **train_accuracies(learn, o.recipe)}
    row |= what_it_took(checkpoint, joules_before) | what_computed() | best_epoch(curve)
    row |= dict(n_train=len(dls.train_ds), n_judge=len(dls.valid_ds))
    write_run(o, curve, z, y)
    if o.run not in runs_in(file):      # another process may have been faster
        add_row(file, {c: row.get(c) for c in columns})
    checkpoint.file.unlink(missing_ok=True)
    print_run(row)

def print_run(row):
    "Print a run's accuracies and seconds on one line"
    accuracies = ' '.join(f'{e} {row[e]:.2f}' for e in exits if e in row)
    print(f"{row['run']}: {accuracies} in {row['seconds']:.0f} s", flush=True)

def train(o):
    "One run on CIFAR-100"
    arch = getattr(eed_models, f'cifar_{o.network}')
    if o.width:
        arch = partial(arch, width=o.width)
    train_row(o, 'cifar100', partial(get_dls, o.data, o.dataset, o.protocol, o.bs, o.device), arch)

# --- the command ------------------------------------------------------------------------------------------------------

def split_commas(text):
    "The parts between commas that are not empty"
    return [part for part in str(text).split(',') if part]

def check_choices(choices, given, what):
    "An error that names the choices, if something given is none of them"
    wrong = [o for o in given if o not in choices]
    if wrong:
        given_wrong = ', '.join(map(str, wrong))
        raise CliError(f"There is no {what} {given_wrong}; there are {', '.join(map(str, choices))}")

def check_options(recipe, schedule, protocol, dataset, network, amp):
    "Errors for options that are no choice, or that this machine cannot have"
    networks = [o.removeprefix('cifar_') for o in eed_models.__all__ if o.startswith('cifar_')]
    check_choices(all_recipes, split_commas(recipe), 'recipe')
    check_choices(('one_cycle', 'paper'), [schedule], 'schedule')
    check_choices(('select', 'report'), [protocol], 'protocol')
    check_choices(tasks, [dataset], 'dataset')
    check_choices(networks, split_commas(network), 'network')
    check_choices(('bf16', 'fp16'), [amp] if amp else [], 'mixed precision')
    if amp and not torch.cuda.is_available():
        raise CliError('--amp needs a GPU, and there is none here')

def check_data(path, task):
    "A one-line error if the images cannot be read"
    try:
        load(path, task)
    except (OSError, ValueError) as e:
        raise CliError(str(e)) from e

def print_tables(table, results):
    "Print one of the paper's tables beside ours, or else the summary"
    if table:
        check_choices((1, 2, 4), [table], 'table')
    df = side_by_side(table, results) if table else paired_summary(results)
    with pd.option_context('display.width', 250, 'display.max_columns', 30, 'display.max_colwidth', 60):
        print(df.to_string(index=False))

def run_jobs(jobs, seeds):
    "Start this command again for each share of the seeds, and wait"
    shares = [seeds[i::jobs] for i in range(jobs) if seeds[i::jobs]]
    command = [sys.executable, __file__, *sys.argv[1:], '--jobs', '1', '--seeds']
    processes = [subprocess.Popen([*command, ','.join(share)]) for share in shares]
    if any([process.wait() for process in processes]):
        raise CliError('A run failed; see above')

@call_parse
def main(
    data:str=None, # Folder with CIFAR-100
    network:str='resnet18', # Networks, with commas: resnet18, resnet50, vgg19, …
    recipe:str='plain,joint_ce,eed_mse,eed_kl', # Recipes, with commas
    seeds:str='0', # Seeds, with commas
    epochs:int=200, # Epochs (200: EED code)
    schedule:str='one_cycle', # one_cycle, or paper: SGD with steps at 75, 130 and 180 of 200
    protocol:str='report', # select or report, see above
    # cifar100, or a part of its training images: cifar100-20x100 (every fifth class, the first 100 of each),
    # cifar100-100x100, cifar100-100x25
    dataset:str='cifar100',
    width:int=None, # Channels of the first stage (the network's own)
    lr:float=0.1, # (Highest) learning rate (0.1: EED code)
    wd:float=5e-4, # Weight decay of all parameters (5e-4: EED code)
    bs:int=128, # Images in a batch (128: EED code)
    nesterov:bool=False, # Nesterov's momentum (EED code: not)
    amp:str=None, # Mixed precision: bf16 or fp16, on a GPU
    channels_last:bool=False, # Channels-last memory format
    compile:bool=False, # torch.compile
    threads:int=None, # CPU threads
    every:int=10, # Epochs between checkpoints
    judge_every:int=1, # Epochs between two points of the curve; the last epoch is always judged
    jobs:int=1, # Runs side by side, each with its share of the seeds
    results:str=str(here/'results'), # Folder of the rows
    table:int=None, # Print the paper's table 1, 2 or 4 beside ours, and train nothing
    summary:bool=False, # Print means and paired differences, and train nothing
):
    "Train rows of the paper's tables on CIFAR-100, or print them"
    results = Path(results)
    if table or summary:
        return print_tables(table, results)
    if data is None:
        raise CliError('Give --data, the folder with CIFAR-100')
    check_options(recipe, schedule, protocol, dataset, network, amp)
    check_data(data, dataset)
    if jobs>1:
        return run_jobs(jobs, split_commas(seeds))
    if threads:
        torch.set_num_threads(threads)
    settings = dict(data=data, dataset=dataset, width=width, protocol=protocol, schedule=schedule, epochs=epochs)
    settings |= dict(lr=lr, wd=wd, bs=bs, nesterov=nesterov, amp=amp, channels_last=channels_last, compile=compile)
    settings |= dict(device=default_device(), results=results, every=every, judge_every=judge_every)
    for net, seed, rec in itertools.product(split_commas(network), map(int, split_commas(seeds)), split_commas(recipe)):
        train(SimpleNamespace(**settings, network=net, seed=seed, recipe=rec))
