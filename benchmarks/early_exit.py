"""Does early exit save time? Milliseconds for a batch, beside the same work by hand, the multiply-adds, and earlyon.

    python benchmarks/early_exit.py                      # all networks, batch 1 and 64: results/early_exit.csv
    python benchmarks/early_exit.py --compaction         # taking images out of a batch: results/compaction.csv

The variants take turns, round by round and in each round in another order, after a warm-up. Each is called twice: the
first call comes after another variant, which has filled the processor's caches with its own (`first_p50`,
`first_ratio`); the second is what a program gets that answers image after image (`p50`, `p95` from 40 rounds on,
`ratio`, and the shares). A ratio is the median of the rounds' own ratios, so that a machine that slows down for a
while slows both sides. Time nothing else meanwhile. With `pip install earlyon==0.3` its wrapper is timed on the same
backbone, heads and images.
"""

import importlib.util, random, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fastai.vision.all import *
from fastcore.script import *

from cifar100_tables import here
from speed import sync
from eed_fastai.all import *

# Name → what makes it, side of its images, classes
networks = {
    'cifar_resnet18-w16': (partial(cifar_resnet18, width=16), 32, 100),
    'cifar_resnet18': (cifar_resnet18, 32, 100),
    'resnet18-128px': (resnet18, 128, 100),
}
n_warm_up = 3
by_main = 'main network by hand'

def make_network(name, device):
    "An untrained network, so that no score comes near 1, in eval mode and channels-last, and its images' side"
    arch, size, n_out = networks[name]
    set_seed(0)
    return multi_exit(arch, n_out).eval().to(device, memory_format=torch.channels_last), size

def random_images(bs, size, device):
    "A batch of noise, channels-last"
    return torch.randn(bs, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

# --- by hand ----------------------------------------------------------------------------------------------------------

def walk(model, x, i):
    "By hand: stages and heads 0 … i"
    for stage, head in list(model)[:i+1]:
        x = stage(x)
        z, _ = head(x)
    return z

def asking_walk(model, x, i):
    "By hand, and the least that asking takes: is the likeliest class likely enough?"
    for stage, head in list(model)[:i+1]:
        x = stage(x)
        z, _ = head(x)
        if all((z.softmax(-1).amax(-1)>=1.1).tolist()):
            break
    return z

def walk_rest(model, x, i):
    "By hand: stages and heads behind exit i"
    for stage, head in list(model)[i+1:]:
        x = stage(x)
        head(x)

# --- earlyon ----------------------------------------------------------------------------------------------------------

class HeadLogits(nn.Module):
    "A head that gives its logits only"
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        "Logits, without the feature"
        return self.head(x)[0]

def wrap_earlyon(model, x, thresholds):
    "A call of earlyon's wrapper on the same stages and heads"
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint
    model = deepcopy(model)              # earlyon's hooks stay on the stages
    early = range(model.n_exits-1)
    points = [ExitPoint(f'e{i}', str(i), model.shapes[i][0]) for i in early]
    config = EarlyExitConfig('custom', model.n_out, points, confidence_thresholds=thresholds)
    backbone = nn.Sequential(*model.stages, HeadLogits(model.heads[-1]))
    heads = {f'e{i}': HeadLogits(model.heads[i]) for i in early}
    wrapper = EarlyExitWrapper(backbone, heads, nn.Identity(), config, (1, *x.shape[1:])).eval()
    return partial(wrapper, x, mode='inference') if len(x)==1 else partial(wrapper.forward_inference_batched, x)

def earlyon_variants(model, x):
    "The same stages and heads in earlyon's wrapper; a batch of its leaves together or not at all"
    if importlib.util.find_spec('earlyon') is None:
        return {}
    k = model.n_exits
    return {
        'earlyon, none leaves': (wrap_earlyon(model, x, [1.]*(k-1)), 'all open, none leaves'),
        'earlyon, all leave at exit0': (wrap_earlyon(model, x, [0.]*(k-1)), 'all leave at exit0'),
    }

# --- the variants -----------------------------------------------------------------------------------------------------

def first_half(z):
    "A score: at the first exit every other image is sure, later none"
    if z.shape[1]>1:
        return torch.zeros(len(z), device=z.device)
    return (torch.arange(len(z), device=z.device)%2==0).float()

def leaving_variants(model, x, i):
    "All leave at exit i, by hand and by `early_exit`"
    thresholds = [1.]*i + [0.]*(model.n_exits-1-i)
    by_hand = f'walk to exit{i} by hand'
    return {
        by_hand: (partial(walk, model, x, i), None),
        f'walk to exit{i}, asking by hand': (partial(asking_walk, model, x, i), by_hand),
        f'all leave at exit{i}': (partial(early_exit, model, x, thresholds), by_hand),
    }

def half_variants(model, x):
    "Half of a batch leaves at the first exit: taken out of the batch, or kept in it"
    half = partial(early_exit, model, x, [.5]*(model.n_exits-1), first_half)
    return {
        'half leave at exit0': (half, by_main),
        'half leave at exit0, kept in the batch': (partial(half, compact=2.), by_main),
    }

def variants(model, x):
    "Name → (function, name of what it is compared with)"
    k = model.n_exits
    found = {
        by_main: (partial(model.upto(-1), x), None),
        'all closed': (partial(early_exit, model, x, [2.]*(k-1)), by_main),
        'all exits by hand': (partial(model.all_exits, x), None),
        'all open, none leaves': (partial(early_exit, model, x, [1.]*(k-1)), 'all exits by hand'),
    }
    for i in range(k-1):
        found |= leaving_variants(model, x, i)
    if len(x)>1:
        found |= half_variants(model, x)
    return found | earlyon_variants(model, x)

# --- timing -----------------------------------------------------------------------------------------------------------

def milliseconds_of(f):
    "Milliseconds of one call"
    sync()
    start = time.perf_counter()
    f()
    sync()
    return 1000*(time.perf_counter()-start)

def measure(fs, rounds):
    "Milliseconds `(2,rounds)` of each function: of the first call after another function, and of the next"
    times = {name: ([], []) for name in fs}
    order = random.Random(0)
    with torch.no_grad():
        for _ in range(rounds+n_warm_up):
            for name in order.sample([*fs], len(fs)):
                for ms in times[name]:
                    ms.append(milliseconds_of(fs[name]))
    return {name: np.array(ms)[:,n_warm_up:] for name, ms in times.items()}

def variant_macs(model, size):
    "Multiply-adds for an image, of the variants where they are known; the main network's own first"
    costs = part_macs(model, size)
    walks = walk_costs(costs)
    macs = {
        by_main: alone_costs(costs)[-1],
        'all closed': alone_costs(costs)[-1],
        'all open, none leaves': walks[-1],
        'half leave at exit0': (walks[0]+walks[-1])/2,
    }
    return macs | {f'all leave at exit{i}': walks[i] for i in range(model.n_exits-1)}

def time_row(name, against, ms):
    "Medians of a variant's times, and of its ratios to what it is compared with"
    first, steady = ms[name]
    return dict(
        variant=name,
        p50=np.median(steady),
        p95=np.quantile(steady, .95) if len(steady)>=40 else None,
        first_p50=np.median(first),
        against=against,
        ratio=np.median(steady/ms[against][1]) if against else None,
        first_ratio=np.median(first/ms[against][0]) if against else None,
        time_share=np.median(steady/ms[by_main][1]),
    )

def measure_early_exit(name, bs, rounds, device):
    "A row for each variant on a network"
    model, size = make_network(name, device)
    found = variants(model, random_images(bs, size, device))
    ms = measure({variant: f for variant, (f, _) in found.items()}, rounds)
    macs = variant_macs(model, size)
    macs_main = macs.pop(by_main)
    rows = []
    for variant, (_, against) in found.items():
        share = macs[variant]/macs_main if variant in macs else None
        rows.append(dict(network=name, bs=bs, **time_row(variant, against, ms), macs_share=share))
    return pd.DataFrame(rows)

# --- taking images out ------------------------------------------------------------------------------------------------

def rest_without(model, x, i, gone):
    "The rest of the network after exit i, without the images that left; the copy is included"
    walk_rest(model, x[(~gone).nonzero().squeeze(1)], i)

def measure_rest(model, x, i, rounds):
    "Milliseconds of the rest after exit i, by how many images have left"
    fs = {0: partial(walk_rest, model, x, i)}
    for n in (1, 2, 4, 8, 16, 32):
        gone = torch.arange(len(x), device=x.device)<n
        fs[n] = partial(rest_without, model, x, i, gone)
    return {n: steady for n, (_, steady) in measure(fs, rounds).items()}

def measure_compaction(name, bs, rounds, device):
    "The rest of the network after an exit, for the whole batch, and for the batch without those that left"
    model, size = make_network(name, device)
    x = random_images(bs, size, device)
    rows = []
    for i in range(model.n_exits-1):
        with torch.no_grad():
            x = model.stages[i](x)
        ms = measure_rest(model, x, i, rounds)
        whole = ms.pop(0)
        for n, t in ms.items():
            setting = dict(network=name, bs=bs, after=f'exit{i}', gone=n, share=n/bs)
            rows.append(dict(setting, p50=np.median(t), whole=np.median(whole), ratio=np.median(t/whole)))
    return pd.DataFrame(rows)

# --- the command ------------------------------------------------------------------------------------------------------

def write_rows(file, df, name, bs):
    "Write a network's rows to `file`; those that this run does not measure again stay"
    if file.exists():
        others = pd.read_csv(file).query('network!=@name or bs!=@bs')
        df = pd.concat([others, df])
    write_whole(file, partial(df.to_csv, index=False))

@call_parse
def main(
    network:str=None, # One of the networks above (all)
    rounds:int=120, # Rounds at batch 1; a tenth of them at batch 64
    threads:int=None, # PyTorch's threads (as many as cores)
    compaction:bool=False, # Measure what taking images out of a batch costs and saves instead
    results:str=None, # Folder of the rows (`results` beside this file)
):
    "Time early exit, or what is left of a network when images have left the batch"
    if threads:
        torch.set_num_threads(threads)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    measure_network = measure_compaction if compaction else measure_early_exit
    file = Path(results or here/'results')/('compaction.csv' if compaction else 'early_exit.csv')
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in [network] if network else networks:
        for bs in [64] if compaction else [1, 64]:
            n = rounds if bs==1 else max(rounds//10, 2)
            measured = measure_network(name, bs, n, device).round(4)
            about = dict(rounds=n, hardware=hardware(), torch=torch.__version__, commit=checkout())
            write_rows(file, measured.assign(**about), name, bs)
            print(measured.to_string(index=False), '\n', flush=True)
