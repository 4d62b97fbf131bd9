"""Seconds for a training step: the reference's, ours by hand, ours in a Learner, and the plain network; and how cost grows.

    python benchmarks/speed.py                     # cifar_resnet18 at batch 64, and a tiny network, on this machine
    python benchmarks/speed.py --growth            # time and memory against exits, classes, image size and batch
    python benchmarks/speed.py --epochs            # seconds for an epoch of CIFAR-100, for a GPU

Ratios are taken within one run: the variants take turns, round by round, and each figure is the median over the rounds.
Rows go to `results/speed.csv` and `results/growth.csv`. Time nothing else meanwhile.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fastai.vision.all import *
from fastcore.script import *

from cifar100 import checkout, hardware, here, sgd
from eed_fastai.all import *
from eed_fastai.records import add_row

def sync(): torch.cuda.synchronize() if torch.cuda.is_available() else None

# --- networks and data ------------------------------------------------------------------------------------------------

def tiny(n_in=3):
    "Three convolutions, so small that a step is mostly the host's own work"
    conv = lambda i, o, s: nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(conv(n_in,8,1), nn.Conv2d(8,8,3,1,1), nn.ReLU(), nn.Conv2d(8,8,3,2,1), nn.ReLU(), nn.Conv2d(8,8,3,2,1), nn.ReLU())

networks = {'cifar_resnet18': (cifar_resnet18, 32, 64, 100), 'tiny': (tiny, 16, 64, 10)}      # makes it, side, batch, classes

def random_dls(n, bs, size=32, n_out=100, device=None):
    "`n` batches of noise through the package's own loader, so that its cost is in every figure"
    rng = np.random.default_rng(0)
    part = rng.integers(0, 256, (n*bs,size,size,3), dtype=np.uint8),rng.integers(0, n_out, n*bs)
    return array_dls(part, (part[0][:bs], part[1][:bs]), vocab=range_of(range(n_out)), bs=bs, device=device)

# --- the steps --------------------------------------------------------------------------------------------------------

def reference_loss(z, f, y):
    "The reference's objective with its default settings, exit by exit: CE, MSE to the mean logits, masked MSE to the mean feature"
    zs,fs = z.unbind(1),f.unbind(1)
    zt,ft = (sum(zs)/len(zs)).detach(),(sum(fs)/len(fs)).detach()
    loss = sum(F.cross_entropy(o, y) for o in zs) + sum(F.mse_loss(o, zt) for o in zs)
    return loss + sum(((o-ft)**2 * ((o>0) | (ft>0)).float()).mean() for o in fs)

def eed_loss(z, f, y): return exit_ce(z, y) + logit_mse(z, ensemble_teacher(z.detach()))
def eed_feat_loss(z, f, y): return eed_loss(z, f, y) + feat_mse(f, ensemble_teacher(f.detach()))

def by_hand(model, loss, dls, amp=False):
    "An epoch of a plain PyTorch loop, as a function"
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    def epoch():
        model.train()
        for x,y in dls.train:
            x,y = x.as_subclass(Tensor),y.as_subclass(Tensor)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                if loss is None: l = F.cross_entropy(model(x).float(), y)
                else:
                    z,f = model.all_exits(x)
                    l = loss(z.float(), f.float(), y)
            l.backward(); opt.step(); opt.zero_grad()
    return epoch

class SmoothOnDevice(AvgSmoothLoss):
    "fastai's smoothed loss, kept where the loss is: fastai copies it to the CPU after each batch, and so waits for the GPU"
    def accumulate(self, learn):
        self.count += 1
        self.val = torch.lerp(learn.loss.detach().mean(), self.val.to(learn.loss.device, learn.loss.dtype), self.beta)

def in_learner(model, cbs, dls, amp=False, on_device=False):
    "An epoch of training in a Learner, without validation, as a function"
    learn = Learner(dls, model, opt_func=sgd, lr=0.01, wd=5e-4, wd_bn_bias=True, cbs=cbs)
    if amp: learn.to_bf16()
    if on_device: learn.recorder.smooth_loss = SmoothOnDevice()
    class TrainOnly(Callback):
        def before_validate(self): raise CancelValidException
    learn.add_cb(TrainOnly())
    def epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return epoch

def variants(arch, n_out, dls, amp=False, compile=False):
    "Name → one epoch"
    def model(channels_last=False):
        torch.manual_seed(0)
        m = multi_exit(arch, n_out).to(dls.device)
        if channels_last: m = m.to(memory_format=torch.channels_last)
        if compile: m.compile(); m.all_exits = torch.compile(m.all_exits)
        return m
    feat = dict(alpha=1., beta=1.)
    return {'reference step':                 by_hand(model(), reference_loss, dls, amp),
            'by hand':                        by_hand(model(), eed_feat_loss, dls, amp),
            'by hand, channels-last':         by_hand(model(True), eed_feat_loss, dls, amp),
            'Learner':                        in_learner(model(), EEDCallback(**feat), dls, amp),
            'Learner, channels-last':         in_learner(model(True), EEDCallback(**feat), dls, amp),
            'Learner, channels-last, β=0':    in_learner(model(True), EEDCallback(), dls, amp),
            'Learner, channels-last, loss stays on device': in_learner(model(True), EEDCallback(**feat), dls, amp, True),
            'joint CE in Learner, channels-last': in_learner(model(True), EEDCallback(alpha=0.), dls, amp),
            'plain by hand':                  by_hand(model(), None, dls, amp),
            'plain in Learner':               in_learner(model(), [], dls, amp),
            'plain in Learner, channels-last': in_learner(model(True), [], dls, amp)}

def measure(epochs, rounds, n):
    "Median seconds for a batch of each variant, taking turns, and its peak memory in MB on a GPU"
    times,memory = {k: [] for k in epochs},{}
    for i in range(rounds+1):
        for name,epoch in epochs.items():
            if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
            sync(); start = time.perf_counter()
            epoch()
            sync()
            if i: times[name].append((time.perf_counter()-start)/n)       # the first round warms up
            if torch.cuda.is_available(): memory[name] = torch.cuda.max_memory_allocated()/2**20
    df = pd.DataFrame(dict(seconds={k: float(np.median(v)) for k,v in times.items()}, fastest={k: min(v) for k,v in times.items()}, peak_memory=memory or None))
    df.attrs['rounds'] = times
    return df

def steps(name, rounds, n, amp=False, compile=False, bs=None):
    arch,size,bs_,n_out = networks[name]
    bs = bs or bs_
    dls = random_dls(n, bs, size, n_out)
    df = measure(variants(arch, n_out, dls, amp, compile), rounds, n)
    df['ratio'] = df.seconds/df.seconds['reference step']
    times = df.attrs['rounds']
    df = df.rename_axis('variant').reset_index().assign(network=name, bs=bs, amp=amp, compile=compile)
    df.attrs['rounds'] = times
    return df

def callback_ms(times):
    "Milliseconds a batch that the callback adds to bare fastai, beyond the mathematics: (Learner − by hand) with exits, less the same without. Median over rounds, and half the range of its middle half"
    t = {k: 1000*np.array(v) for k,v in times.items()}
    d = (t['Learner']-t['by hand']) - (t['plain in Learner']-t['plain by hand'])
    return np.median(d),(np.quantile(d, .75)-np.quantile(d, .25))/2

def callback_in_place(rounds=5, n=100):
    "Milliseconds a batch spent in the callback's own events, and in the same objective by hand, each timed where it runs; medians over all batches"
    arch,size,bs,n_out = networks['tiny']
    dls,own,hand = random_dls(n, bs, size, n_out),[],[]
    original = EEDCallback.__call__
    def timed(self, event):
        if event=='before_batch' and self.training: own.append(0.)
        start = time.perf_counter()
        try: return original(self, event)
        finally:
            if own and self.training: own[-1] += time.perf_counter()-start
    def loss(z, f, y):
        start = time.perf_counter()
        res = eed_feat_loss(z, f, y)
        hand.append(time.perf_counter()-start)
        return res
    epochs = in_learner(multi_exit(arch, n_out), EEDCallback(beta=1.), dls),by_hand(multi_exit(arch, n_out), loss, dls)
    EEDCallback.__call__ = timed
    try:
        for _ in range(rounds):
            for e in epochs: e()
    finally: EEDCallback.__call__ = original
    return 1000*np.median(own),1000*np.median(hand)

# --- data path, matrix rate -------------------------------------------------------------------------------------------

def data_rate(bs=128, n=60):
    "Images a second that the loader alone gives, cropped, mirrored and normalised"
    dls = random_dls(n, bs)
    for _ in range(2):
        sync(); start = time.perf_counter()
        for xb,_ in dls.train: pass
        sync(); rate = n*bs/(time.perf_counter()-start)
    return rate

def matrix_rate(dtype, size=4096 if torch.cuda.is_available() else 1024, n=10):
    "FLOP a second of a square matrix product, the ceiling that a step is held against"
    a = torch.randn(size, size, device=default_device()).to(dtype)
    for _ in range(2):
        sync(); start = time.perf_counter()
        for _ in range(n): a@a
        sync(); rate = 2*size**3*n/(time.perf_counter()-start)
    return rate

def step_flop(arch, n_out, size, bs):
    "FLOP of a training step with all exits: three times the forward's, two for each multiply-add"
    return 6*bs*int(exit_costs(multi_exit(arch, n_out), size, ensemble=True).macs.iloc[-1])

# --- growth -----------------------------------------------------------------------------------------------------------

def saved_mb(model, x, all_exits):
    "Megabytes that the forward keeps for the backward, parameters not counted"
    own,seen = {p.untyped_storage().data_ptr() for p in model.parameters()},{}
    def pack(t):
        if t.untyped_storage().data_ptr() not in own: seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): keep = model.all_exits(x) if all_exits else model(x)
    return sum(seen.values())/2**20

def grow(what, values, rounds, width=16, exits=4, n_out=100, size=32, bs=64):
    "Seconds and megabytes of a step, with and without exits, as one thing grows"
    rows = []
    for v in values:
        kw = {**dict(exits=exits, n_out=n_out, size=size, bs=bs), what: v}
        net = partial(cifar_resnet18, width=width)
        make = lambda: multi_exit(net, kw['n_out'], cuts=['layer1','layer2','layer3'][4-kw['exits']:])
        dls = random_dls(3, kw['bs'], kw['size'], kw['n_out'])
        m,x = make().to(dls.device),dls.one_batch()[0].as_subclass(Tensor)
        df = measure({'eed': in_learner(make(), EEDCallback(), dls), 'plain': in_learner(make(), [], dls)}, rounds, 3)
        rows.append(dict(what=what, value=v, eed_s=df.seconds['eed'], plain_s=df.seconds['plain'], eed_mb=saved_mb(m, x, True), plain_mb=saved_mb(m, x, False), eed_params=total_params(m)[0], plain_params=total_params(m.upto(-1))[0]))
        print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False, header=len(rows)==1), flush=True)
    return rows

grid = dict(exits=(2,3,4), n_out=(10,100,1000,10000), size=(32,64,96), bs=(16,64,256))

# --- the command ------------------------------------------------------------------------------------------------------

def write_rows(name, df):
    "Rows with commit, versions and hardware, behind those that are there"
    df = df.assign(commit=checkout(here), hardware=hardware(), torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    file = here/'results'/name
    file.parent.mkdir(exist_ok=True)
    for row in df.round(6).to_dict('records'): add_row(file, row)

def epoch_seconds(rounds, bs=128):
    "Seconds for an epoch of 50,000 images, fp32 against bf16, with and without torch.compile"
    n = 391
    for amp,compile in ((False,False), (True,False), (True,True)):
        df = steps('cifar_resnet18', rounds, n, amp, compile, bs)
        df['epoch_seconds'] = df.seconds*n
        df['share_of_matrix_rate'] = step_flop(cifar_resnet18, 100, 32, bs)/df.seconds/matrix_rate(torch.bfloat16 if amp else torch.float32)
        print(df.round(4).to_string(index=False), flush=True)
        write_rows('speed.csv', df)

@call_parse
def main(
    rounds:int=5, # Rounds of which the median is taken, after one to warm up
    n:int=4, # Batches a round, on cifar_resnet18; the tiny network takes 50 times as many
    network:str=None, # cifar_resnet18 or tiny (both)
    growth:bool=False, # How cost grows, instead
    epochs:bool=False, # Seconds for an epoch, instead; for a GPU
    threads:int=None, # CPU threads
    write:bool=False, # Append the rows to `results`
):
    "Time training steps"
    if threads: torch.set_num_threads(threads)
    if epochs: return epoch_seconds(rounds)
    if growth:
        df = pd.DataFrame(sum((grow(k, v, rounds) for k,v in grid.items()), []))
        return write_rows('growth.csv', df) if write else None
    for name in [network] if network else networks:
        df = steps(name, rounds, n*50 if name=='tiny' else n)
        print(df[['network','bs','variant','seconds','fastest','ratio']].round(5).to_string(index=False), flush=True)
        if name=='tiny': print('The callback adds {:.2f} ms a batch to bare fastai, beyond the mathematics (± {:.2f} from round to round)'.format(*callback_ms(df.attrs['rounds'])), flush=True)
        if name=='tiny': print('Timed in place, its events take {:.2f} ms a batch, and the same objective by hand {:.2f} ms'.format(*callback_in_place()), flush=True)
        if write: write_rows('speed.csv', df)
    print(f'The data path alone gives {data_rate():,.0f} images a second')
    print(f'A matrix product runs at {matrix_rate(torch.float32)/1e9:,.0f} GFLOP/s here; a step of cifar_resnet18 with all exits takes {step_flop(cifar_resnet18, 100, 32, 64)/1e9:,.0f} GFLOP')
