"fastai's own callbacks: what they do reaches all exits, and nothing is left behind. See also test_beside_others."

import pickle
import pytest
from conftest import *
from fastai.callback.mixup import *
from fastai.callback.training import *
from fastai.callback.channelslast import *


class KeepGrads(Callback):
    "The gradients of every step"

    order = 100

    def before_fit(self):
        self.grads = []

    def before_step(self):
        self.grads.append([None if p.grad is None else p.grad.clone() for p in self.model.parameters()])


class EvalMode(Callback):
    "Batch norm as in evaluation, so that a large batch and its halves see the same network"

    order = -5

    def before_batch(self):
        self.model.eval()


def fit(learn, n=1, **kw):
    with learn.no_logging():
        learn.fit(n, 1e-2, **kw)
    return learn


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_labels_reach_every_exit(mix):
    "The exits' loss under MixUp is the interpolation of the two labels' losses, exit by exit"
    seen = []

    class Look(Callback):
        order = EEDCallback.order + 1
        run_valid = False

        def after_loss(self):
            mixer, z = first(o for o in self.learn.cbs if isinstance(o, mix)), self.learn.exits.logits
            ce = lambda y: sum(F.cross_entropy(z[:, i], y, reduction='none') for i in range(3))
            seen.append(
                (
                    float(self.learn.exit_terms['exit_loss']),
                    float(torch.lerp(ce(mixer.yb1[0]), ce(self.yb[0]), mixer.lam.squeeze()).mean()),
                )
            )

    learn = fit(make_learner([EEDCallback(), mix(), Look()]))
    assert len(seen) == 4 and all(abs(a - b) < 1e-4 for a, b in seen)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)


def test_label_smoothing_reaches_every_exit():
    learn = make_learner(EEDCallback(alpha=0.0), loss_func=LabelSmoothingCrossEntropyFlat())
    xb, yb = (o.as_subclass(Tensor) for o in learn.dls.one_batch())
    learn.model.eval()
    learn.xb, learn.yb, learn.training = (xb,), (yb,), True
    learn('before_batch')
    learn.pred = learn.model(xb)
    learn('after_pred')
    learn.loss_grad = learn.loss_func(learn.pred, yb)
    learn('after_loss')
    z, _ = learn.model.all_exits(xb)
    expected = sum(F.cross_entropy(z[:, i], yb, label_smoothing=0.1) for i in range(4))
    assert torch.allclose(learn.loss_grad, expected, atol=1e-4)


@pytest.mark.parametrize('recipe', ['joint_ce', 'eed_mse_feat', 'eed_kl_code', 'main_kl'])
def test_accumulated_gradients_are_the_large_batch(recipe):
    items = small_digits().train_ds
    base = multi_exit(tiny_resnet, n_out=10)

    def grads(bs, *cbs):
        dls = small_digits(bs=bs)
        dls.train = dls.train.new(shuffle=False)
        keep = KeepGrads()
        fit(
            make_learner(
                [EEDCallback(**recipes[recipe]), keep, EvalMode(), *cbs], dls=dls, model=deepcopy(base), opt_func=SGD
            )
        )
        return keep.grads

    large, small = grads(32), grads(16, GradientAccumulation(32))
    assert len(large) == len(small) == 2
    for a, b in zip(large[0], small[0]):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    assert max(g.abs().max() for g in large[0]) > 1e-2


def test_gradient_clip():
    class Norm(KeepGrads):
        pass

    keep = Norm()
    fit(make_learner([EEDCallback(), GradientClip(0.1), keep]))
    for g in keep.grads:
        assert torch.stack([o.norm() for o in g]).norm() <= 0.1001


class CPUAutocast(Callback):
    "Mixed precision on a CPU, entered and left where fastai's own is"

    order = MixedPrecision.order

    def before_batch(self):
        self.cm = torch.autocast('cpu', torch.bfloat16)
        self.cm.__enter__()

    def after_pred(self):
        self.dtype = self.learn.pred.dtype
        self.learn.pred = self.learn.pred.float()

    def after_loss(self):
        self.cm.__exit__(None, None, None)


@pytest.mark.parametrize(
    'kw',
    [recipes['eed_mse_feat'], recipes['eed_kl_feat'], dict(teacher=weighted_teacher([1, 2, 3, 4]), beta=1.0)],
    ids=['mse', 'kl', 'weighted'],
)
def test_mixed_precision_has_float32_losses(kw):
    seen = []
    asked = []
    teacher = kw['teacher']
    kw = dict(kw, teacher=lambda z: (asked.append((z.dtype, teacher(z).dtype)), teacher(z))[1])

    class Look(Callback):
        order = CPUAutocast.order - 1

        def after_pred(self):
            seen.append((self.learn.pred.dtype, self.learn.exits.logits.dtype, self.learn.exits.feats.dtype))

        def after_loss(self):
            seen.append(tuple(o.dtype for o in self.learn.exit_terms.values()))

    learn = fit(make_learner([EEDCallback(**kw), CPUAutocast(), Look()]), 2)
    assert seen[0] == (torch.bfloat16, torch.float32, torch.float32)
    assert set(seen[1]) == {torch.float32} and set(asked) == {(torch.float32, torch.float32)}
    assert all(np.isfinite(learn.final_record))


def test_no_overflow_where_half_precision_would():
    learn = make_learner(EEDCallback(beta=1.0))
    learn.xb, learn.yb, learn.training = (torch.zeros(2, 3, 32, 32),), (torch.tensor([0, 1]),), True
    learn('before_batch')
    z = torch.full((2, 4, 10), 3e2).half()
    z[:, 0] *= -1  # squares to 3.6e5, and half precision ends at 65504
    learn.pred = Exits(z, z)
    learn('after_pred')
    learn.loss_grad = torch.tensor(0.0)
    learn('after_loss')
    assert torch.isfinite(learn.loss_grad) and learn.exit_terms['logit_loss'] > 65504


def test_channels_last():
    learn = make_learner(EEDCallback()).to_channelslast()
    fit(learn)
    assert learn.get_preds()[0].shape == (32, 10)
    model = multi_exit(tiny_resnet).to(memory_format=torch.channels_last)
    model.build(10)
    assert model.heads[0].convs[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_save_model_on_an_exits_column():
    "The best epoch's weights are loaded: `validate` gives that epoch's value in the column that was watched"
    learn = make_learner([EEDCallback(), SaveModelCallback(monitor='exit0', with_opt=True)])
    fit(learn, 3)
    shown = learn.recorder.metric_names[1:-1]
    of_exit0 = [dict(zip(shown, row))['exit0'] for row in learn.recorder.values]
    assert (Path('models') / 'model.pth').exists()
    found = dict(zip(['valid_loss', *learn.metrics.attrgot('name')], learn.validate()))
    assert abs(found['exit0'] - max(of_exit0)) < 1e-6


def test_early_stopping_and_csv():
    learn = make_learner(
        [EEDCallback(), EarlyStoppingCallback(monitor='ensemble', min_delta=2.0, patience=1), CSVLogger()]
    )
    fit(learn, 5)
    log = pd.read_csv('history.csv')
    assert len(log) == 2 and {'exit0', 'exit1', 'exit2', 'main', 'ensemble', 'exit_loss', 'logit_loss'} <= set(
        log.columns
    )


def test_train_metrics():
    learn = make_learner(EEDCallback())
    learn.recorder.train_metrics = True
    fit(learn)
    names = list(learn.recorder.metric_names[1:-1])
    row = dict(zip(names, learn.recorder.values[-1]))
    assert {'train_exit0', 'valid_exit0', 'train_logit_loss', 'valid_logit_loss'} <= set(names)
    assert 0 <= row['train_main'] <= 1 and row['train_accuracy'] == row['train_main']


@pytest.mark.parametrize(
    'event',
    ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch', 'before_validate'],
)
@pytest.mark.parametrize('order', [-20, 7, 70])
def test_interrupted_fit_leaves_nothing(event, order):
    class CtrlC(Callback):
        def __init__(self):
            self.order = order

    def interrupt(self):
        if getattr(self, 'done', False) or (event != 'before_validate' and self.train_iter < 1):
            return
        self.done = True
        raise KeyboardInterrupt

    setattr(CtrlC, event, interrupt)
    learn = make_learner(EEDCallback())
    names = learn.metrics.attrgot('name')
    cb = CtrlC()
    learn.add_cb(cb)
    with pytest.raises(KeyboardInterrupt):
        fit(learn)
    learn.remove_cb(cb)
    assert learn.metrics.attrgot('name') == names
    x = torch.randn(2, 3, 32, 32)
    if event == 'before_batch' and order > EEDCallback.order:
        learn.model(x)  # the documented hole: exactly one call
    assert isinstance(learn.model(x), Tensor)
    assert deepcopy(learn.model)(x).shape == (2, 10)
    fit(learn)
    assert learn.metrics.attrgot('name') == names and learn.exits is None
    learn.remove_cb(EEDCallback)
    assert learn.metrics.attrgot('name') == ['accuracy'] and not hasattr(learn, 'exits')


def test_two_fits_add_no_columns():
    learn = make_learner(EEDCallback())
    fit(learn)
    names = list(learn.recorder.metric_names)
    fit(learn, 2)
    assert (
        list(learn.recorder.metric_names) == names and len(set(names)) == len(names) and len(learn.recorder.values) == 2
    )
    learn.metrics = [accuracy, error_rate]  # the user changes his mind
    fit(learn)
    assert list(learn.recorder.metric_names[3:6]) == ['accuracy', 'error_rate', 'exit0']


def test_deepcopy_and_pickle():
    learn = fit(make_learner(EEDCallback(teacher=weighted_teacher([1, 2, 3, 4]), beta=0.5)))
    for other in (deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        assert other._grab_cbs(EEDCallback)[0].learn is other
        fit(other)
        assert other.validate()[0] > 0
    x = torch.randn(2, 3, 32, 32)
    learn.model.eval()
    assert torch.equal(pickle.loads(pickle.dumps(learn.model))(x), learn.model(x))


def test_as_if_it_had_never_been_there():
    "A plain fit after `remove_cb` equals, bit by bit, a plain fit of a Learner that never had the callback"

    def run(once_had):
        set_seed(1)
        learn = make_learner(model=multi_exit(tiny_resnet, n_out=10))
        if once_had:
            learn.add_cb(EEDCallback())
            learn.remove_cb(EEDCallback)
        set_seed(2)
        return fit(learn)

    a, b = run(False), run(True)
    assert set(a.__dict__) == set(b.__dict__)
    assert [type(cb) for cb in a.cbs] == [type(cb) for cb in b.cbs]
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        assert torch.equal(p, q)


def test_valid_loss_is_the_main_networks():
    learn = fit(make_learner(EEDCallback(beta=1.0)))
    v = dict(zip(learn.recorder.metric_names[2:-1], learn.validate()))
    z, y = learn.get_preds(act=noop)
    assert abs(v['valid_loss'] / F.cross_entropy(z, y).item() - 1) < 1e-4


def test_train_loss_is_the_whole_objective():
    losses = []

    class Look(Callback):
        order = 40
        run_valid = False

        def after_loss(self):
            losses.append(
                (
                    float(self.learn.loss),
                    float(F.cross_entropy(self.pred, self.yb[0]) + sum(self.learn.exit_terms.values())),
                )
            )

    fit(make_learner([EEDCallback(beta=1.0), Look()]))
    assert losses and all(abs(a - b) < 1e-4 for a, b in losses)


def test_another_callback_that_eats_the_request_is_named():
    class Greedy(Callback):
        order = EEDCallback.order + 1

        def before_batch(self):
            self.model(*self.xb)

    with pytest.raises(RuntimeError, match='another callback called the model'):
        fit(make_learner([EEDCallback(), Greedy()]))


def test_mixed_labels_and_an_ignored_class():
    fit(make_learner([EEDCallback(), MixUp()], loss_func=CrossEntropyLossFlat(ignore_index=255), dls=with_ignored(255)))


def with_ignored(v):
    dls = small_digits()

    class Ignore(Transform):
        def encodes(self, y: TensorCategory):
            y = y.clone()
            y[0] = v
            return y

    dls.add_tfms([Ignore()], 'after_batch')
    return dls


def test_the_users_own_exit_metrics_stay():
    mine = [accuracy, ExitMetric(F1Score(average='macro'), 0, 'f1_exit0'), EnsembleMetric(RocAuc(), 'auc')]
    learn = make_learner(EEDCallback(), metrics=mine)
    assert learn.metrics.attrgot('name')[:3] == ['accuracy', 'f1_exit0', 'auc']
    learn.remove_cb(EEDCallback)
    assert learn.metrics.attrgot('name') == ['accuracy', 'f1_exit0', 'auc']


@pytest.mark.parametrize(
    'opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9)], ids=['fastai', 'torch']
)
def test_a_late_callback_keeps_the_optimizers_state(opt_func):
    learn = make_learner(model=multi_exit(tiny_resnet), opt_func=opt_func)
    learn.create_opt()
    p = next(learn.model.stages.parameters())
    p.grad = torch.ones_like(p)
    learn.opt.step()
    state = lambda: (
        learn.opt.opt.state[p]['momentum_buffer']
        if isinstance(learn.opt, OptimWrapper)
        else learn.opt.state[p]['grad_avg']
    )
    before = state().clone()
    learn.opt.set_hyper('lr', 0.0123)
    learn.add_cb(EEDCallback())
    assert torch.equal(state(), before) and abs(learn.opt.hypers[0]['lr'] - 0.0123) < 1e-9
    fit(learn)


def test_alpha_changed_between_epochs():
    class Anneal(Callback):
        def after_epoch(self):
            self.learn.eed.alpha = 0.0

    learn = fit(make_learner([EEDCallback(), Anneal()]), 2)
    col = learn.recorder.metric_names[1:].index('logit_loss')
    assert learn.recorder.values[0][col] > 0 and learn.recorder.values[1][col] == 0


def test_another_model_between_fits():
    learn = fit(make_learner(EEDCallback()))
    learn.model, learn.opt = multi_exit(tiny_resnet, cuts=['layer2', 'layer3']), None  # not built, and with three exits
    fit(learn)
    assert learn.metrics.attrgot('name')[:5] == ['accuracy', 'exit0', 'exit1', 'main', 'ensemble']
    assert len(learn.opt.all_params()) == len(list(learn.model.parameters()))
