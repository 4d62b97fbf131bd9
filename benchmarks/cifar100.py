"""CIFAR-100: train any row of the Exit-Ensemble Distillation paper's Tables I, II and IV, one CSV row for each run.

    python benchmarks/cifar100.py --data CIFAR100 --recipe plain,joint_ce,eed_mse,eed_kl --seeds 0,1,2      # train
    python benchmarks/cifar100.py --table 1                                                                 # published beside ours
    python benchmarks/cifar100.py --summary                                                                 # means and paired differences

CIFAR100 is a folder with the original pickles, with fastai's image folders, or with one sheet of 32×32 tiles for each class.
Every row trains through `Learner(dls, multi_exit(…), cbs=EEDCallback(…))`; the recipe 'plain' is the same network and Learner
without the callback. A run that is there already is not run again, and one that was cut off goes on from its checkpoint.

Two protocols, named in the row:
  select   45,000 images train and the 5,000 validation tiles judge; the test images are not touched. For choosing settings.
  report   settings are frozen, all 50,000 train, and the last epoch is the figure. The test curve is recorded for the paper's
           Figs. 3 and 5. The best epoch, as the paper selects, has a column of its own and chooses nothing.
"""
import hashlib, platform, random, subprocess, sys
from importlib.metadata import version

from fastai.vision.all import *
from fastcore.script import *

from eed_fastai import models as eed_models
from eed_fastai.all import *
from eed_fastai.compare import comparison_table, exit_scores, mean_sd, named_logits, paired
from eed_fastai.records import add_row, checkout, hardware, peak_memory, write_whole
from eed_fastai.data import array_dls, cifar100_stats, read_cifar100
from eed_fastai.predictions import GatherExits
from eed_fastai.model import unwrap

here = Path(__file__).resolve().parent
n_early = 3     # exits before the main one that a row has room for

# --- data -----------------------------------------------------------------------------------------------------------

def read_sheet(f):
    "A sheet of 25 tiles a row as images `(n,32,32,3)`"
    a = np.asarray(Image.open(f).convert('RGB'))
    return a.reshape(-1, 32, 25, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)

def read_sheets(path):
    "Class sheets as `read_cifar100` gives them, and which training images are validation tiles"
    vocab = sorted(f.stem for f in (path/'train').glob('*.webp'))
    sets = [[read_sheet(path/part/f'{c}.webp') for c in vocab] for part in ('train', 'test')]
    tiles = {name: set(map(int, rest)) for name,*rest in map(str.split, (path/'train-val.txt').read_text().splitlines())}
    is_val = np.array([i in tiles[c] for c,x in zip(vocab, sets[0]) for i in range(len(x))])
    return *[(np.concatenate(xs), np.repeat(range_of(vocab), [len(x) for x in xs])) for xs in sets], vocab, is_val

def read_data(path):
    "Training set, test set, names, and which training images judge under 'select'"
    path = Path(path)
    if (path/'train-val.txt').exists(): return read_sheets(path)
    train,test,vocab = read_cifar100(path)
    is_val = np.zeros(len(train[1]), bool)
    for c in range_of(vocab): is_val[np.flatnonzero(train[1]==c)[-50:]] = True     # no list: the last 50 of each class
    return train, test, vocab, is_val

def take(part, mask, classes): return part[0][mask], np.searchsorted(classes, part[1][mask])

def subset(train, test, vocab, is_val, every, first):
    "Every `every`-th class, and of each its first `first` training images"
    classes = np.arange(0, len(vocab), every)
    rank = np.concatenate([np.arange((train[1]==c).sum()) for c in range_of(vocab)])
    order = np.argsort(train[1], kind='stable')
    keep = np.isin(train[1], classes)
    keep[order[rank>=first]] = False
    return take(train, keep, classes), take(test, np.isin(test[1], classes), classes), [vocab[c] for c in classes], is_val[keep]

tasks = {    # name → every which class, and the first how many training images of each
    'cifar100': (1, 500),
    'cifar100-20x100': (5, 100),    # a small task that overfits
    'cifar100-100x100': (1, 100),
    'cifar100-100x25': (1, 25),
}

@functools.lru_cache(1)
def load(path, task): return subset(*read_data(path), *tasks[task])

def get_dls(path, task, protocol, bs, device):
    train,test,vocab,is_val = load(path, task)
    if protocol=='select': train,test = [(train[0][m], train[1][m]) for m in (~is_val, is_val)]
    return array_dls(train, test, vocab, cifar100_stats, bs=bs, val_bs=2*bs if device.type=='cpu' else 2000, device=device)

# --- recipes --------------------------------------------------------------------------------------------------------

all_recipes = {**{k: v for k,v in recipes.items() if v.get('teacher') is not ExternalTeacher}, **subset_recipes()}

# --- one run --------------------------------------------------------------------------------------------------------

def sgd(params, **kw): return OptimWrapper(params, torch.optim.SGD, momentum=0.9, **kw)

steps = {'paper': (75/200, 130/200, 180/200), 'imagenet': (30/90, 60/90)}     # shares of the training after which the rate is divided by 10: EED code; MSDNet, IMTA
def step_lr(lr, at, pct): return lr * 0.1**sum(pct>=o for o in at)

class Checkpoint(Callback):
    "Every `every` epochs, write all that a run needs to go on"
    order = Recorder.order+1
    def __init__(self, file, every): store_attr(); self.rows,self.before,self.smooth = [],0.,None

    def state(self):
        return dict(model=unwrap(self.learn.model).state_dict(), opt=self.learn.opt.opt.state_dict(), rows=self.rows, seconds=self.seconds, smooth=(self.recorder.smooth_loss.count, self.recorder.smooth_loss.val),
                    rng=(torch.get_rng_state(), np.random.get_state(), random.getstate(), self.dls.train.rng.getstate()),
                    cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

    def load(self, learn):
        "Put `learn` where the file left it; the epoch to go on with"
        if not self.file.exists(): return 0
        s = torch.load(self.file, map_location='cpu', weights_only=False)
        unwrap(learn.model).load_state_dict(s['model']); learn.opt.opt.load_state_dict(s['opt'])
        torch.set_rng_state(s['rng'][0]); np.random.set_state(s['rng'][1]); random.setstate(s['rng'][2]); learn.dls.train.rng.setstate(s['rng'][3])
        if s['cuda'] is not None: torch.cuda.set_rng_state(s['cuda'])
        self.rows,self.before,self.smooth = s['rows'],s['seconds'],s['smooth']
        return len(self.rows)

    @property
    def seconds(self): return self.before + time.perf_counter() - self.start

    def before_fit(self):
        self.start = time.perf_counter()
        if self.smooth: self.recorder.smooth_loss.count,self.recorder.smooth_loss.val = self.smooth

    def after_epoch(self):
        if self.epoch<len(self.rows): return        # trained before the cut, and skipped now
        self.rows.append(dict(zip(self.recorder.metric_names[:-1], self.recorder.log[:-1]), seconds=round(self.seconds, 2)))
        if len(self.rows)%self.every==0 and len(self.rows)<self.n_epoch: write_whole(self.file, partial(torch.save, self.state()))

class JudgeEvery(Callback):
    "Validate after every `n`-th epoch and the last one only"
    def __init__(self, n): self.n = n
    def before_validate(self):
        if (self.epoch+1)%self.n and self.epoch+1<self.n_epoch: raise CancelValidException

def make_learner(o, dls, arch):
    set_seed(o.seed)
    model = multi_exit(arch, n_out=dls.c, head=all_recipes[o.recipe].head)      # heads for 'plain', too: the same seed then gives the same body and the same batches
    cbs = [] if o.recipe=='plain' else EEDCallback(**all_recipes[o.recipe])
    learn = Learner(dls, model, opt_func=partial(sgd, nesterov=o.nesterov), lr=o.lr, wd=o.wd, wd_bn_bias=True, metrics=accuracy, cbs=cbs)
    if o.channels_last: learn.add_cb(ChannelsLast())
    if o.amp: {'bf16': learn.to_bf16, 'fp16': learn.to_fp16}[o.amp]()
    if o.compile: learn.model.compile()
    return learn

def fit(learn, o, checkpoint):
    learn.create_opt()
    if o.channels_last: learn.model.to(memory_format=torch.channels_last)
    start = checkpoint.load(learn)
    if start: print(f'{o.run}: goes on after epoch {start}', flush=True)
    cbs,kw = [checkpoint, JudgeEvery(o.judge_every)],dict(wd=o.wd, start_epoch=start)
    with learn.no_bar(), learn.no_logging():
        if o.schedule in steps: learn.fit(o.epochs, o.lr, cbs=[*cbs, ParamScheduler({'lr': partial(step_lr, o.lr, steps[o.schedule])})], **kw)
        else: learn.fit_one_cycle(o.epochs, o.lr, cbs=cbs, **kw)

def gather_logits(learn, recipe, dl):
    "Logits of every trained exit and the ensemble, by name, and the classes"
    gather = GatherExits()
    with learn.no_bar(), learn.added_cbs([EEDCallback(alpha=0.)] if recipe=='plain' else []):
        learn.get_preds(dl=dl, reorder=False, cbs=gather)
    z = named_logits(torch.cat(gather.zs).cpu(), unwrap(learn.model).exit_names)
    y = torch.cat(gather.ys).cpu()
    if recipe=='plain':
        z = {'main': z['main']}              # its other heads were never trained
    return z, y

def unaugmented_dl(dls):
    "The training images as test images are: none left out, no augmentation"
    return dls.valid.new(dataset=dls.train_ds, shuffle=False, drop_last=False)

def train_accuracies(learn, recipe):
    "Accuracy of every exit and the ensemble on the training images, in eval mode and without augmentation, in %"
    with learn.dls.train_ds.set_split_idx(1):
        z,y = gather_logits(learn, recipe, unaugmented_dl(learn.dls))
    return {f'train_{name}': round(100*(o.argmax(1)==y).float().mean().item(), 4) for name,o in z.items()}

def write_npz(file, arrays):
    "Write arrays by name to a compressed file"
    with open(file, 'wb') as f:
        np.savez_compressed(f, **arrays)

def correct_bits(z, y):
    "Which images each exit and the ensemble get right, packed eight to a byte"
    return {name: np.packbits((o.argmax(1)==y).numpy()) for name,o in z.items()}

def half_logits(z, y):
    "Logits of each exit as float16, and the classes; the ensemble follows from them"
    return {'y': y.numpy().astype(np.int16), **{name: o.numpy().astype(np.float16) for name,o in z.items() if name!='ensemble'}}

def joules():
    "Energy that the GPU has used so far, if NVML can be asked"
    try:
        import pynvml
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device()))/1000
    except Exception: return None

commit = checkout(here)
exits = [*[f'exit{i}' for i in range(n_early)], 'main', 'ensemble']
train_columns = [f'train_{e}' for e in exits]
columns = ['dataset','network','width','recipe','protocol','epochs','seed','commit','hardware','torch','seconds','peak_memory',*exits,
           'best_epoch','best_main',*[f'{m}_{e}' for m in ('nll','ece') for e in exits],'schedule','lr','wd','bs','nesterov','amp','channels_last','compile',
           'n_train','n_judge','joules',*train_columns,'fastai','torchvision','python','eed_fastai','run']

def run_name(o):
    "What tells this run from others: the main settings in words, all of them in a few letters"
    all_of_it = {k: v for k,v in vars(o).items() if k not in ('data','results','every','run','device','judge_every')}
    return f"{o.dataset}-{o.network}{f'-w{o.width}' if o.width else ''}-{o.recipe}-{o.protocol}-{o.schedule}{o.epochs}-s{o.seed}-{hashlib.sha1(repr(sorted(all_of_it.items())).encode()).hexdigest()[:6]}"

def there(file): return set(pd.read_csv(file).run) if file.exists() else set()

def train_row(o, name, make_dls, arch):
    "One run, from its settings to its row in `name`.csv"
    o.run = run_name(o)
    file = o.results/f'{name}.csv'
    if o.run in there(file): return print(f'{o.run}: there already', flush=True)
    for d in ('history', 'bits', 'logits', 'checkpoints'): (o.results/d).mkdir(parents=True, exist_ok=True)
    energy = joules()
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    set_seed(o.seed)            # a loader draws its order from a generator that is seeded when it is made
    dls = make_dls()
    learn = make_learner(o, dls, arch)
    checkpoint = Checkpoint(o.results/'checkpoints'/f'{o.run}.pth', o.every)
    fit(learn, o, checkpoint)
    curve = pd.DataFrame(checkpoint.rows).round(5)
    z,y = gather_logits(learn, o.recipe, dls.valid)
    res = exit_scores(z, y)
    on_train = train_accuracies(learn, o.recipe)
    row = {**vars(o), **res, **on_train, 'seconds': round(checkpoint.seconds, 1), 'commit': commit, 'hardware': hardware(), 'peak_memory': peak_memory(), 'torch': torch.__version__,
           'best_epoch': int(curve.accuracy.idxmax()), 'best_main': round(100*curve.accuracy.max(), 4), 'n_train': len(dls.train_ds), 'n_judge': len(dls.valid_ds),
           'joules': round(joules()-energy) if energy is not None else None, 'python': platform.python_version(), **{p: version(p) for p in ('fastai','torchvision','eed_fastai')}}
    write_whole(o.results/'history'/f'{o.run}.csv', partial(curve.to_csv, index=False))
    for folder,arrays in (('bits', correct_bits(z, y)), ('logits', half_logits(z, y))):
        write_whole(o.results/folder/f'{o.run}.npz', partial(write_npz, arrays=arrays))
    if o.run not in there(file): add_row(file, {c: row.get(c) for c in columns})      # another process may have been faster
    checkpoint.file.unlink(missing_ok=True)
    print(f"{o.run}: " + ' '.join(f'{e} {res[e]:.2f}' for e in exits if e in res) + f" in {row['seconds']:.0f} s", flush=True)

def train(o):
    arch = partial(getattr(eed_models, f'cifar_{o.network}'), **({'width': o.width} if o.width else {}))
    train_row(o, 'cifar100', partial(get_dls, o.data, o.dataset, o.protocol, o.bs, o.device), arch)

# --- tables ---------------------------------------------------------------------------------------------------------

methods = {('Baseline','CE',None): 'plain', ('BranchyNet','CE',0): 'joint_ce', **{(m,l.upper(),b): f"{who}_{l}{'_feat'*b}"
           for m,who,betas in (('PL','main',(0,)), ('BYOT','main',(1,)), ('EED','eed',(0,1))) for l in ('kl','mse') for b in betas}}
teachers = {'Main': 'main_mse', 'Exit1+Main': 'subset_0_main', 'Exit3+Main': 'subset_2_main', 'Exit1+Exit3+Main': 'subset_0_2_main', 'Exit1+Exit2+Exit3': 'subset_0_1_2', 'Exit1+Exit2+Exit3+Main': 'eed_mse'}
networks = {'VGG19': 'vgg19', 'ResNet-18': 'resnet18', 'ResNet-50': 'resnet50', 'ResNet-101': 'resnet101', 'ResNet-152': 'resnet152',
            'ResNeXt29-4': 'resnext29', 'WideResNet28-10': 'wrn28_10', 'PyramidNet110-270': 'pyramidnet110'}

def published(table):
    "The paper's Table I, II or IV: network, recipe, and accuracies"
    df = pd.read_csv(here/'published'/f'table{table}.csv')
    if table==1: df['recipe'] = [methods[m,l,None if pd.isna(b) else int(b)] for m,l,b in zip(df.method, df.output_loss, df.beta)]
    if table==2: df = df[df.dataset=='CIFAR-100']; df['recipe'] = [methods[m,'CE' if m=='BranchyNet' else 'KL',0] for m in df.method]
    if table==4: df['network'],df['recipe'] = 'ResNet-18',df.teacher.map(teachers)
    df['network'] = df.network.map(networks)
    return df.rename(columns={f'exit{i+1}': f'exit{i}' for i in range(n_early)}).reset_index(drop=True)

def ours(results, **fixed):
    "Rows of full CIFAR-100 under 'report', or those that `fixed` asks for"
    file = results/'cifar100.csv'
    df = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=columns)
    for k,v in fixed.items(): df = df[df[k]==v]
    return df

def side_by_side(table, results):
    "Published and ours, a row of the paper's table each; ours in mean ± standard deviation (seeds), by schedule"
    rows,mine = [],ours(results, dataset='cifar100', protocol='report')
    mine = mine[mine.width.isna()]
    for p in published(table).itertuples():
        got = mine[(mine.network==p.network) & (mine.recipe==p.recipe)]
        for (schedule,epochs),g in list(got.groupby(['schedule','epochs'])) or [(('',''), got)]:
            cols = {c: f"{getattr(p, c):.2f} | {mean_sd(g[c], 'not yet run')}" for c in exits[:-1] if not pd.isna(getattr(p, c, np.nan))}
            rows.append(dict(network=p.network, recipe=p.recipe, schedule=f'{schedule} {epochs}', **cols))
    return pd.DataFrame(rows).fillna('')

def paired_summary(results):
    "For each setting and recipe: mean, standard deviation and pairs, and main's difference from joint CE and from plain"
    setting = ['dataset','network','width','protocol','schedule','epochs']
    tables = [comparison_table(g, ['joint_ce','plain']).drop(columns='seconds').assign(**dict(zip(setting, key))) for key,g in ours(results).groupby([*setting, 'lr','bs','hardware'], dropna=False)]
    df = pd.concat([pd.DataFrame(columns=[*setting, 'recipe', *exits]), *tables])
    return df.dropna(axis=1, how='all').fillna('') if tables else df

# --- the command ----------------------------------------------------------------------------------------------------

def words(s): return [o for o in str(s).split(',') if o]

def check(choices, given, what):
    wrong = [o for o in given if o not in choices]
    if wrong: raise CliError(f"There is no {what} {', '.join(map(str, wrong))}; there are {', '.join(map(str, choices))}")

def side_by_side_runs(jobs, seeds):
    "Start this command again for each share of the seeds, and wait"
    argv = [o for o in sys.argv[1:]]
    shares = [seeds[i::jobs] for i in range(jobs) if seeds[i::jobs]]
    procs = [subprocess.Popen([sys.executable, __file__, *argv, '--jobs', '1', '--seeds', ','.join(s)]) for s in shares]
    if any([p.wait() for p in procs]): raise CliError('A run failed; see above')

@call_parse
def main(
    data:str=None, # Folder with CIFAR-100
    network:str='resnet18', # Networks, with commas: resnet18, resnet50, vgg19, …
    recipe:str='plain,joint_ce,eed_mse,eed_kl', # Recipes, with commas
    seeds:str='0', # Seeds, with commas
    epochs:int=200, # Epochs (200: EED code)
    schedule:str='one_cycle', # one_cycle, or paper: SGD with steps at 75, 130 and 180 of 200
    protocol:str='report', # select or report, see above
    dataset:str='cifar100', # cifar100, or a part of its training images: cifar100-20x100 (every fifth class, the first 100 of each), cifar100-100x100, cifar100-100x25
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
        if table: check((1,2,4), [table], 'table')
        with pd.option_context('display.width', 250, 'display.max_columns', 30, 'display.max_colwidth', 60): return print((side_by_side(table, results) if table else paired_summary(results)).to_string(index=False))
    if data is None: raise CliError('Give --data, the folder with CIFAR-100')
    for given,choices,what in ((words(recipe), all_recipes, 'recipe'), ([schedule], ('one_cycle','paper'), 'schedule'), ([protocol], ('select','report'), 'protocol'), ([dataset], tasks, 'dataset'),
                               (words(network), [o[6:] for o in eed_models.__all__ if o.startswith('cifar_')], 'network'), ([amp] if amp else [], ('bf16','fp16'), 'mixed precision')): check(choices, given, what)
    if amp and not torch.cuda.is_available(): raise CliError('--amp needs a GPU, and there is none here')
    try: load(data, dataset)
    except (OSError, ValueError) as e: raise CliError(str(e)) from e
    if jobs>1: return side_by_side_runs(jobs, words(seeds))
    if threads: torch.set_num_threads(threads)
    for net,seed,rec in itertools.product(words(network), map(int, words(seeds)), words(recipe)):
        train(SimpleNamespace(data=data, dataset=dataset, network=net, width=width, recipe=rec, protocol=protocol, schedule=schedule, epochs=epochs, seed=seed, lr=lr, wd=wd, bs=bs,
                              nesterov=nesterov, amp=amp, channels_last=channels_last, compile=compile, device=default_device(), results=results, every=every, judge_every=judge_every))
