"""Seconds for a training step: the reference's, ours by hand and in a Learner, and the plain network; how cost grows.

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

from cifar100 import here, sgd
from eed_fastai.all import *

def sync():
    "Wait until the GPU has done what was asked of it"
    if torch.cuda.is_available():
        torch.cuda.synchronize()

def seconds_of(f):
    "Seconds of one call"
    sync()
    start = time.perf_counter()
    f()
    sync()
    return time.perf_counter()-start

# --- networks and data ------------------------------------------------------------------------------------------------

def conv_bn_relu(ni, nf, stride):
    "A 3×3 convolution, batch norm and ReLU"
    return nn.Sequential(nn.Conv2d(ni, nf, 3, stride, 1, bias=False), nn.BatchNorm2d(nf), nn.ReLU())

def tiny(n_in=3):
    "Three convolutions, so small that a step is mostly the host's own work"
    return nn.Sequential(
        conv_bn_relu(n_in, 8, 1),
        nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
    )

# Name → what makes it, side of its images, batch, classes
networks = {'cifar_resnet18': (cifar_resnet18, 32, 64, 100), 'tiny': (tiny, 16, 64, 10)}

def random_dls(n, bs, size=32, n_out=100, device=None):
    "`n` batches of noise through the package's own loader, so that its cost is in every figure"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n*bs, size, size, 3), dtype=np.uint8)
    classes = rng.integers(0, n_out, n*bs)
    one_batch = images[:bs], classes[:bs]
    return array_dls((images, classes), one_batch, vocab=range_of(range(n_out)), bs=bs, device=device)

# --- the steps --------------------------------------------------------------------------------------------------------

def masked_mse(f, target):
    "The reference's feature loss: where both are at most 0, nothing counts"
    counts = ((f>0) | (target>0)).float()
    return ((f-target)**2 * counts).mean()

def reference_loss(z, f, y):
    "The reference's objective with its defaults: CE, MSE to the mean logits, masked MSE to the mean feature, by exit"
    zs = z.unbind(1)
    fs = f.unbind(1)
    mean_logits = (sum(zs)/len(zs)).detach()
    mean_feature = (sum(fs)/len(fs)).detach()
    labels = sum(F.cross_entropy(o, y) for o in zs)
    logits = sum(F.mse_loss(o, mean_logits) for o in zs)
    features = sum(masked_mse(o, mean_feature) for o in fs)
    return labels + logits + features

def eed_loss(z, f, y):
    "EED's objective with α = 1 and β = 0"
    return exit_ce(z, y) + logit_mse(z, ensemble_teacher(z.detach()))

def eed_feat_loss(z, f, y):
    "EED's objective with α = 1 and β = 1"
    return eed_loss(z, f, y) + feat_mse(f, ensemble_teacher(f.detach()))

def loss_of_batch(model, loss, x, y):
    "`loss` of all exits, or without one the main network's cross entropy"
    if loss is None:
        return F.cross_entropy(model(x).float(), y)
    z, f = model.all_exits(x)
    return loss(z.float(), f.float(), y)

def by_hand(model, loss, dls, amp=False):
    "An epoch of a plain PyTorch loop, as a function"
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    def epoch():
        "Train on every batch once"
        model.train()
        for x, y in dls.train:
            x = x.as_subclass(Tensor)
            y = y.as_subclass(Tensor)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                of_batch = loss_of_batch(model, loss, x, y)
            of_batch.backward()
            opt.step()
            opt.zero_grad()
    return epoch

class SmoothOnDevice(AvgSmoothLoss):
    "fastai's smoothed loss, kept where the loss is: fastai copies it to the CPU each batch, and so waits for the GPU"
    def accumulate(self, learn):
        "Take a batch's loss in"
        self.count += 1
        loss = learn.loss.detach().mean()
        self.val = torch.lerp(loss, self.val.to(learn.loss.device, learn.loss.dtype), self.beta)

class TrainOnly(Callback):
    "Training without validation"
    def before_validate(self):
        "Skip the validation"
        raise CancelValidException

def in_learner(model, cbs, dls, amp=False, on_device=False):
    "An epoch of training in a Learner, without validation, as a function"
    learn = Learner(dls, model, opt_func=sgd, lr=0.01, wd=5e-4, wd_bn_bias=True, cbs=cbs)
    if amp:
        learn.to_bf16()
    if on_device:
        learn.recorder.smooth_loss = SmoothOnDevice()
    learn.add_cb(TrainOnly())
    def epoch():
        "One fit of one epoch"
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
    return epoch

def variants(arch, n_out, dls, amp=False, compile=False):
    "Name → one epoch"
    def model(channels_last=False):
        "A network from one seed"
        torch.manual_seed(0)
        m = multi_exit(arch, n_out).to(dls.device)
        if channels_last:
            m = m.to(memory_format=torch.channels_last)
        if compile:
            m.compile()
            m.all_exits = torch.compile(m.all_exits)
        return m
    def hand(loss, channels_last=False):
        "A training step by hand"
        return by_hand(model(channels_last), loss, dls, amp)
    def learner(cbs, channels_last=False, on_device=False):
        "The same in a Learner"
        return in_learner(model(channels_last), cbs, dls, amp, on_device)
    def with_features():
        "The callback with the features' distance, too"
        return EEDCallback(alpha=1., beta=1.)
    return {
        'reference step': hand(reference_loss),
        'by hand': hand(eed_feat_loss),
        'by hand, channels-last': hand(eed_feat_loss, True),
        'Learner': learner(with_features()),
        'Learner, channels-last': learner(with_features(), True),
        'Learner, channels-last, β=0': learner(EEDCallback(), True),
        'Learner, channels-last, loss stays on device': learner(with_features(), True, on_device=True),
        'joint CE in Learner, channels-last': learner(EEDCallback(alpha=0.), True),
        'plain by hand': hand(None),
        'plain in Learner': learner([]),
        'plain in Learner, channels-last': learner([], True),
    }

# --- timing -----------------------------------------------------------------------------------------------------------

def measure(epochs, rounds, n):
    "Median seconds for a batch of each variant, taking turns, and its peak memory in MB on a GPU"
    times = {name: [] for name in epochs}
    memory = {}
    for i in range(rounds+1):
        for name, epoch in epochs.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds = seconds_of(epoch)
            if i>0:                     # the first round warms up
                times[name].append(seconds/n)
            if torch.cuda.is_available():
                memory[name] = torch.cuda.max_memory_allocated()/2**20
    medians = {name: float(np.median(v)) for name, v in times.items()}
    fastest = {name: min(v) for name, v in times.items()}
    df = pd.DataFrame(dict(seconds=medians, fastest=fastest, peak_memory=memory or None))
    df.attrs['rounds'] = times
    return df

def time_steps(name, rounds, n, amp=False, compile=False, bs=None):
    "A row for each variant of a training step on a network; the seconds of all rounds are in `attrs`"
    arch, size, own_bs, n_out = networks[name]
    bs = bs or own_bs
    dls = random_dls(n, bs, size, n_out)
    measured = measure(variants(arch, n_out, dls, amp, compile), rounds, n)
    measured['ratio'] = measured.seconds/measured.seconds['reference step']
    df = measured.rename_axis('variant').reset_index().assign(network=name, bs=bs, amp=amp, compile=compile)
    df.attrs['rounds'] = measured.attrs['rounds']
    return df

# --- what the callback adds -------------------------------------------------------------------------------------------

def callback_ms(times):
    "Milliseconds a batch that the callback adds, beyond the mathematics: median, and half of its middle half's range"
    ms = {name: 1000*np.array(v) for name, v in times.items()}
    learner_with_exits = ms['Learner']-ms['by hand']
    learner_without = ms['plain in Learner']-ms['plain by hand']
    added = learner_with_exits - learner_without
    return np.median(added), (np.quantile(added, .75)-np.quantile(added, .25))/2

@contextmanager
def timed_callback(seconds):
    "Meanwhile `seconds` gets, for each training batch, the time spent in the events of EEDCallback"
    original = EEDCallback.__call__
    def timed(self, event):
        "Call the callback, and add up the seconds of a batch"
        if event=='before_batch' and self.training:
            seconds.append(0.)
        start = time.perf_counter()
        try:
            return original(self, event)
        finally:
            if seconds and self.training:
                seconds[-1] += time.perf_counter()-start
    EEDCallback.__call__ = timed
    try:
        yield
    finally:
        EEDCallback.__call__ = original

def callback_in_place(rounds=5, n=100):
    "Median milliseconds a batch in the callback's own events, and in the same objective by hand, each timed in place"
    arch, size, bs, n_out = networks['tiny']
    dls = random_dls(n, bs, size, n_out)
    in_callback = []
    in_loss = []
    def timed_loss(z, f, y):
        "The objective, and the seconds that it takes"
        start = time.perf_counter()
        loss = eed_feat_loss(z, f, y)
        in_loss.append(time.perf_counter()-start)
        return loss
    with_callback = in_learner(multi_exit(arch, n_out), EEDCallback(beta=1.), dls)
    without = by_hand(multi_exit(arch, n_out), timed_loss, dls)
    with timed_callback(in_callback):
        for _ in range(rounds):
            with_callback()
            without()
    return 1000*np.median(in_callback), 1000*np.median(in_loss)

# --- data path, matrix rate -------------------------------------------------------------------------------------------

def second_time(f):
    "Seconds of the second of two calls; the first warms up"
    f()
    return seconds_of(f)

def data_rate(bs=128, n=60):
    "Images a second that the loader alone gives, cropped, mirrored and normalised"
    dls = random_dls(n, bs)
    def read_all():
        "Every batch, without a network"
        for _ in dls.train:
            pass
    return n*bs/second_time(read_all)

def matrix_rate(dtype, size=4096 if torch.cuda.is_available() else 1024, n=10):
    "FLOP a second of a square matrix product, the ceiling that a step is held against"
    a = torch.randn(size, size, device=default_device()).to(dtype)
    def products():
        "Matrix products"
        for _ in range(n):
            a@a
    return 2*size**3*n/second_time(products)

def step_flop(arch, n_out, size, bs):
    "FLOP of a training step with all exits: three times the forward's, two for each multiply-add"
    macs = exit_costs(multi_exit(arch, n_out), size, ensemble=True).macs.iloc[-1]
    return 6*bs*int(macs)

# --- growth -----------------------------------------------------------------------------------------------------------

grid = dict(exits=(2, 3, 4), n_out=(10, 100, 1000, 10000), size=(32, 64, 96), bs=(16, 64, 256))

def saved_mb(model, x, all_exits):
    "Megabytes that the forward keeps for the backward, parameters not counted"
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}
    def pack(t):
        "Remember a tensor that is kept for the backward pass"
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t
    def unpack(t):
        "Give it back"
        return t
    forward = model.all_exits if all_exits else model
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        forward(x)
    return sum(kept.values())/2**20

def grow_to(width, rounds, exits, n_out, size, bs):
    "Seconds, megabytes and parameters of a step, with and without exits"
    cuts = ['layer1', 'layer2', 'layer3'][4-exits:]
    def make():
        "The network"
        return multi_exit(partial(cifar_resnet18, width=width), n_out, cuts=cuts)
    n = 3
    dls = random_dls(n, bs, size, n_out)
    model = make().to(dls.device)
    x = dls.one_batch()[0].as_subclass(Tensor)
    steps = {'eed': in_learner(make(), EEDCallback(), dls), 'plain': in_learner(make(), [], dls)}
    seconds = measure(steps, rounds, n).seconds
    return dict(
        eed_s=seconds['eed'],
        plain_s=seconds['plain'],
        eed_mb=saved_mb(model, x, True),
        plain_mb=saved_mb(model, x, False),
        eed_params=total_params(model)[0],
        plain_params=total_params(model.upto(-1))[0],
    )

def grow(what, values, rounds, width=16, exits=4, n_out=100, size=32, bs=64):
    "Rows of a step's seconds and megabytes, with and without exits, as one thing grows"
    usual = dict(exits=exits, n_out=n_out, size=size, bs=bs)
    rows = []
    for value in values:
        cost = grow_to(width, rounds, **usual | {what: value})
        rows.append(dict(what=what, value=value, **cost))
        print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False, header=len(rows)==1), flush=True)
    return rows

def grow_all(rounds, write):
    "The rows of `grid`, one thing after the other"
    rows = [row for what, values in grid.items() for row in grow(what, values, rounds)]
    if write:
        write_rows('growth.csv', pd.DataFrame(rows))

# --- the command ------------------------------------------------------------------------------------------------------

def write_rows(name, df):
    "Rows with commit, versions and hardware, behind those that are there"
    today = time.strftime('%Y-%m-%d')
    df = df.assign(commit=checkout(here), hardware=hardware(), torch=torch.__version__, date=today)
    file = here/'results'/name
    file.parent.mkdir(exist_ok=True)
    for row in df.round(6).to_dict('records'):
        add_row(file, row)

def epoch_seconds(rounds, bs=128):
    "Seconds for an epoch of 50,000 images, fp32 against bf16, with and without torch.compile"
    n = 391
    for amp, compile in ((False, False), (True, False), (True, True)):
        df = time_steps('cifar_resnet18', rounds, n, amp, compile, bs)
        df['epoch_seconds'] = df.seconds*n
        flop_a_second = step_flop(cifar_resnet18, 100, 32, bs)/df.seconds
        df['share_of_matrix_rate'] = flop_a_second/matrix_rate(torch.bfloat16 if amp else torch.float32)
        print(df.round(4).to_string(index=False), flush=True)
        write_rows('speed.csv', df)

def print_callback_cost(times):
    "Print what the callback adds to a step: as a difference of loops, and timed in place"
    added, spread = callback_ms(times)
    print(f'The callback adds {added:.2f} ms a batch to bare fastai, beyond the mathematics '
          f'(± {spread:.2f} from round to round)', flush=True)
    in_callback, in_loss = callback_in_place()
    print(f'Timed in place, its events take {in_callback:.2f} ms a batch, '
          f'and the same objective by hand {in_loss:.2f} ms', flush=True)

def print_rates():
    "Print what the loader and a matrix product reach on this machine"
    print(f'The data path alone gives {data_rate():,.0f} images a second')
    rate = matrix_rate(torch.float32)/1e9
    step = step_flop(cifar_resnet18, 100, 32, 64)/1e9
    print(f'A matrix product runs at {rate:,.0f} GFLOP/s here; '
          f'a step of cifar_resnet18 with all exits takes {step:,.0f} GFLOP')

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
    if threads:
        torch.set_num_threads(threads)
    if epochs:
        return epoch_seconds(rounds)
    if growth:
        return grow_all(rounds, write)
    for name in [network] if network else networks:
        df = time_steps(name, rounds, n*50 if name=='tiny' else n)
        shown = df[['network', 'bs', 'variant', 'seconds', 'fastest', 'ratio']]
        print(shown.round(5).to_string(index=False), flush=True)
        if name=='tiny':
            print_callback_cost(df.attrs['rounds'])
        if write:
            write_rows('speed.csv', df)
    print_rates()
