"""Does early exit save time? Milliseconds for a batch, beside the same work by hand, beside the multiply-adds, and beside the package earlyon.

    python benchmarks/early_exit.py                      # all networks, batch 1 and 64: rows in results/early_exit.csv
    python benchmarks/early_exit.py --compaction         # what taking images out of a batch costs and saves: results/compaction.csv

The variants take turns, round by round and in each round in another order, after a warm-up. Each is called twice: the first call comes after another
variant, which has filled the processor's caches with its own (`first_p50`, `first_ratio`); the second is what a program gets that answers image
after image (`p50`, `p95` from 40 rounds on, `ratio`, and the shares). A ratio is the median of the rounds' own ratios, so that a machine that slows
down for a while slows both sides. Time nothing else meanwhile. With `pip install earlyon==0.3` its wrapper is timed on the same backbone, heads and images.
"""
import random, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fastai.vision.all import *
from fastcore.script import *

from cifar100 import checkout, hardware, here
from speed import sync
from eed_fastai.all import *
from eed_fastai.records import write_whole

networks = {'cifar_resnet18-w16': (partial(cifar_resnet18, width=16), 32, 100), 'cifar_resnet18': (cifar_resnet18, 32, 100), 'resnet18-128px': (resnet18, 128, 100)}

def network(name, device):
    "An untrained network, so that no score comes near 1, in eval mode and channels-last, and its images' side"
    arch,size,n_out = networks[name]
    set_seed(0)
    return multi_exit(arch, n_out).eval().to(device, memory_format=torch.channels_last),size

# --- the variants -----------------------------------------------------------------------------------------------------

def walk(model, x, i):
    "By hand: stages and heads 0 … i"
    for stage,head in list(model)[:i+1]:
        x = stage(x)
        z,_ = head(x)
    return z

def asking_walk(model, x, i):
    "By hand, and the least that asking takes: is the likeliest class likely enough?"
    for stage,head in list(model)[:i+1]:
        x = stage(x)
        z,_ = head(x)
        if all((z.softmax(-1).amax(-1)>=1.1).tolist()): break
    return z

def first_half(z):
    "A score: at the first exit every other image is sure, later none"
    return (torch.arange(len(z), device=z.device)%2==0).float() if z.shape[1]==1 else torch.zeros(len(z), device=z.device)

def variants(model, x):
    "Name → (function, name of what it is compared with)"
    k = model.n_exits
    res = {'main network by hand': (partial(model.upto(-1), x), None), 'all closed': (partial(early_exit, model, x, [2.]*(k-1)), 'main network by hand'),
           'all exits by hand': (partial(model.all_exits, x), None), 'all open, none leaves': (partial(early_exit, model, x, [1.]*(k-1)), 'all exits by hand')}
    for i in range(k-1):
        res[f'walk to exit{i} by hand'] = partial(walk, model, x, i),None
        res[f'walk to exit{i}, asking by hand'] = partial(asking_walk, model, x, i),f'walk to exit{i} by hand'
        res[f'all leave at exit{i}'] = partial(early_exit, model, x, [1.]*i + [0.]*(k-1-i)),f'walk to exit{i} by hand'
    if len(x)>1:
        res['half leave at exit0'] = partial(early_exit, model, x, [.5]*(k-1), first_half),'main network by hand'
        res['half leave at exit0, kept in the batch'] = partial(early_exit, model, x, [.5]*(k-1), first_half, compact=2.),'main network by hand'
    return res | earlyon_variants(model, x)

def earlyon_variants(model, x):
    "The same stages and heads in earlyon's wrapper; a batch of its leaves together or not at all"
    try: from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint
    except ImportError: return {}
    class Logits(nn.Module):
        def __init__(self, head): super().__init__(); self.head = head
        def forward(self, x): return self.head(x)[0]
    k = model.n_exits
    def wrapped(thresholds):
        m = deepcopy(model)              # its hooks stay on the stages
        config = EarlyExitConfig('custom', m.n_out, [ExitPoint(f'e{i}', str(i), m.shapes[i][0]) for i in range(k-1)], confidence_thresholds=thresholds)
        w = EarlyExitWrapper(nn.Sequential(*m.stages, Logits(m.heads[-1])), {f'e{i}': Logits(m.heads[i]) for i in range(k-1)}, nn.Identity(), config, (1, *x.shape[1:])).eval()
        return partial(w, x, mode='inference') if len(x)==1 else partial(w.forward_inference_batched, x)
    return {'earlyon, none leaves': (wrapped([1.]*(k-1)), 'all open, none leaves'), 'earlyon, all leave at exit0': (wrapped([0.]*(k-1)), 'all leave at exit0')}

def measure(fs, rounds):
    "Milliseconds `(2,rounds)` of each function: the first call after another function, and the next; turns are taken in an order that changes, and three rounds warm up"
    times,order = {k: ([],[]) for k in fs},random.Random(0)
    with torch.no_grad():
        for _ in range(rounds+3):
            for name in order.sample([*fs], len(fs)):
                for ms in times[name]:
                    sync(); start = time.perf_counter()
                    fs[name]()
                    sync(); ms.append(1000*(time.perf_counter()-start))
    return {k: np.array(v)[:,3:] for k,v in times.items()}

def rows(name, bs, rounds, device):
    model,size = network(name, device)
    x = torch.randn(bs, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    vs = variants(model, x)
    ms = measure({k: f for k,(f,_) in vs.items()}, rounds)
    costs,k = part_macs(model, size),model.n_exits
    alone = alone_costs(costs)[-1]
    macs = {'all closed': alone, 'all open, none leaves': walk_costs(costs)[-1], 'half leave at exit0': (walk_costs(costs)[0]+walk_costs(costs)[-1])/2,
            **{f'all leave at exit{i}': walk_costs(costs)[i] for i in range(k-1)}}
    return pd.DataFrame([dict(network=name, bs=bs, variant=v, p50=np.median(t), p95=np.quantile(t, .95) if len(t)>=40 else None, first_p50=np.median(first),
                              against=o, ratio=np.median(t/ms[o][1]) if o else None, first_ratio=np.median(first/ms[o][0]) if o else None,
                              time_share=np.median(t/ms['main network by hand'][1]), macs_share=macs[v]/alone if v in macs else None) for v,(first,t) in ms.items() for o in [vs[v][1]]])

# --- taking images out ------------------------------------------------------------------------------------------------

def compaction(name, bs, rounds, device):
    "The rest of the network after an exit, for the whole batch, and for the batch without those that left, the copy included"
    model,size = network(name, device)
    x,res = torch.randn(bs, 3, size, size, device=device).contiguous(memory_format=torch.channels_last),[]
    def rest(x, i):
        for stage,head in list(model)[i+1:]: x = stage(x); head(x)
    with torch.no_grad():
        for i in range(model.n_exits-1):
            x = model.stages[i](x)
            fs = {0: partial(rest, x, i)}
            for n in (1,2,4,8,16,32):
                gone = torch.arange(bs, device=device)<n
                fs[n] = lambda x=x, gone=gone: rest(x[(~gone).nonzero().squeeze(1)], i)
            ms = measure(fs, rounds)
            res += [dict(network=name, bs=bs, after=f'exit{i}', gone=n, share=n/bs, p50=np.median(t), whole=np.median(ms[0][1]), ratio=np.median(t/ms[0][1])) for n,(_,t) in ms.items() if n]
    return pd.DataFrame(res)

# --- the command ------------------------------------------------------------------------------------------------------

@call_parse
def main(
    network:str=None, # One of the networks above (all)
    rounds:int=120, # Rounds at batch 1; a tenth of them at batch 64
    threads:int=None, # PyTorch's threads (as many as cores)
    compaction:bool=False, # Measure what taking images out of a batch costs and saves instead
    results:str=None, # Folder of the rows (`results` beside this file)
):
    if threads: torch.set_num_threads(threads)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    file = Path(results or here/'results')/('compaction.csv' if compaction else 'early_exit.csv')
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in [network] if network else networks:
        for bs in ([64] if compaction else [1, 64]):
            n = rounds if bs==1 else max(rounds//10, 2)
            df = (globals()['compaction'] if compaction else rows)(name, bs, n, device)
            df = df.assign(rounds=n, hardware=hardware(), torch=torch.__version__, commit=checkout()).round(4)
            old = pd.read_csv(file).query('network!=@name or bs!=@bs') if file.exists() else None        # those that this run does not measure again stay
            write_whole(file, partial(pd.concat([old, df]).to_csv, index=False))
            print(df.drop(columns=['rounds','hardware','torch','commit']).to_string(index=False), '\n', flush=True)
