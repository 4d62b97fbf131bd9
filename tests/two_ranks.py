"One recipe in this process or in each of two: `python -m torch.distributed.run --nproc_per_node 2 two_ranks.py …`."

import sys
import torch.distributed as dist
from fastai.distributed import *
from conftest import *

fastai_cuda, Tensor.cuda = Tensor.cuda, lambda self, *args, **kw: self  # fastai's DistributedDL takes a GPU for granted


def begin_in_float64(self):
    "As fastai's, for losses in float64"
    self.count, self.val = 0, torch.zeros((), dtype=torch.float64)


AvgSmoothLoss.reset = begin_in_float64


def without_batch_norm(m):
    "The same network with group norm, which does not look at other images"
    for name, child in m.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(m, name, nn.GroupNorm(2, child.num_features))
        else:
            without_batch_norm(child)
    return m


def learner(recipe, bs):
    "A float64 Learner on 32 images to train on and 30 to validate on, one batch an epoch for all ranks together"
    set_seed(1)
    x, y = torch.randn(62, 3, 32, 32, dtype=torch.float64), torch.arange(62) % 5
    items = list(zip(x, y))
    dls = DataLoaders.from_dsets(items[:32], items[32:], bs=bs, shuffle=False, num_workers=0, device='cpu')
    dls.train = dls.train.new(shuffle=False)
    keywords = dict(recipes[recipe])
    if recipe == 'pl':
        keywords['logit_loss'] = partial(AnnealedKL, max_prob=0.25)  # so that the temperature rises sometimes
    model = without_batch_norm(multi_exit(tiny_resnet, n_out=5)).double()
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), metrics=accuracy, lr=0.1, cbs=EEDCallback(**keywords))
    learn.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
    return learn


def run(out, recipe, find_unused):
    "Four steps; state, columns and predictions go to a file of this rank"
    ranks = int(os.environ.get('WORLD_SIZE', 1))
    learn = learner(recipe, 32 // ranks)
    handlers = {}
    if ranks > 1:
        from accelerate import DistributedDataParallelKwargs

        handlers = dict(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused == 'True')])
    with learn.distrib_ctx(sync_bn=False, **handlers) if ranks > 1 else nullcontext():
        with learn.no_bar(), learn.no_logging():
            learn.fit(4)
            columns = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
            preds, targets = learn.get_preds()
    torch.save(
        dict(
            state=learn.model.state_dict(),
            grads={n: p.grad for n, p in learn.model.named_parameters()},
            columns=columns,
            preds=preds,
        ),
        f'{out}/{recipe}{int(os.environ.get("RANK", 0))}.pth',
    )


if __name__ == '__main__':
    from contextlib import nullcontext

    run(*sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
