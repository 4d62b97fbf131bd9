"Losses, callbacks and Learners that this project did not write: the right value, a warning, or an error."

import pytest
from conftest import *
from eed_fastai.objective import exit_loss


def learner(cbs, dls=None, **kw):
    "A Learner whose batches come in one order"
    dls = small_digits() if dls is None else dls
    dls.train = dls.train.new(shuffle=False)
    set_seed(0)
    return make_learner(cbs, dls=dls, model=multi_exit(tiny_resnet, n_out=10), **kw)


class FirstStep(Callback):
    "Keep the gradients and the terms of the first step, and stop"

    order = 100

    def before_step(self):
        self.grads = [p.grad.clone() for p in self.model.parameters()]
        self.terms = dict(self.learn.exit_terms)
        raise CancelFitException()


def first_step(*cbs, **kw):
    "Gradients and terms of the first batch beside these callbacks"
    learn = learner([EEDCallback(), *cbs, FirstStep()], **kw)
    with learn.no_logging():
        learn.fit(1, 1e-3)
    return learn.first_step.grads, learn.first_step.terms


def by_hand(loss_of, **kw):
    "Gradients of a loss of all exits' logits and the targets, for the first batch"
    learn = learner(None, **kw)
    x, y = (o.as_subclass(Tensor) for o in first(learn.dls.train))
    z, _ = learn.model.train().all_exits(x)
    loss = loss_of(z, y) + logit_mse(z, ensemble_teacher(z.detach()))
    return torch.autograd.grad(loss, list(learn.model.parameters()))


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=2e-3, atol=2e-5 * max(1, b.abs().max()))


def ce_sum(z, y):
    return sum(F.cross_entropy(o, y) for o in z.unbind(1))


# --- losses ---------------------------------------------------------------------------------------------------------


class HardestHalf(CrossEntropyLossFlat):
    "The mean of the harder half of the rows"

    def __call__(self, inp, targ, **kw):
        each = F.cross_entropy(inp.flatten(0, -2), targ.flatten(), reduction='none')
        return each.topk(len(each) // 2).values.mean()


class HardestHalfInside(nn.Module):
    "The same as a module, for fastai's `BaseLoss`"

    reduction = 'mean'

    def forward(self, inp, targ):
        return F.cross_entropy(inp, targ, reduction='none').topk(len(targ) // 2).values.mean()


@pytest.mark.parametrize('lf', [HardestHalf(), BaseLoss(HardestHalfInside)], ids=['subclass', 'inside BaseLoss'])
def test_a_loss_that_keeps_the_hardest_rows_is_asked_for_each_exit(lf):
    z, y = torch.randn(16, 4, 10), torch.randint(10, (16,))
    z[:, 0] *= 8  # an exit that is harder than all others
    assert abs(exit_loss(lf, z, (y,)) - sum(lf(o, y) for o in z.unbind(1))) < 1e-4


class WeightImages(Callback):
    "Count odd classes twice, as for a loss that gives one number for each image"

    order = EEDCallback.order + 1

    def after_loss(self):
        if self.training:
            self.learn.loss_grad = (self.loss_grad * (1.0 + self.yb[0] % 2)).mean()
            self.learn.loss = self.loss_grad.detach().clone()


def odd_twice(exits, y):
    return 1.0 + (y % 2).float()


def weighted(z, y):
    w = 1.0 + (y % 2).float()
    return sum((w * F.cross_entropy(o, y, reduction='none')).mean() for o in z.unbind(1))


def test_images_are_weighted_at_every_exit_by_a_callback_after_ours():
    grads, _ = first_step(WeightImages(), loss_func=CrossEntropyLossFlat(reduction='none'))
    learn = learner(None)
    x, y = (o.as_subclass(Tensor) for o in first(learn.dls.train))
    z, _ = learn.model.train().all_exits(x)
    w = 1.0 + (y % 2).float()
    loss = weighted(z, y) + w.mean() * logit_mse(z, ensemble_teacher(z.detach()))
    assert_close(grads, torch.autograd.grad(loss, list(learn.model.parameters())))


def test_images_weighted_before_ours_are_refused():
    class Earlier(WeightImages):
        order = 0

    learn = learner([EEDCallback(), Earlier()], loss_func=CrossEntropyLossFlat(reduction='none'))
    with pytest.raises(RuntimeError, match='Earlier changed .*`order` above'), learn.no_logging():
        learn.fit(1)


@pytest.mark.parametrize('lf', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), F.cross_entropy])
def test_sample_weights_reach_every_exit(lf):
    cb = EEDCallback(sample_weights=odd_twice)
    learn = learner([cb, FirstStep()], loss_func=lf)
    with learn.no_logging():
        learn.fit(1, 1e-3)
    assert_close(learn.first_step.grads, by_hand(weighted))


def test_sample_weights_that_do_not_fit():
    for weights, words in ((lambda e, y: torch.ones(3), 'shape'), (lambda e, y: 1.0, 'a float')):
        learn = learner([EEDCallback(sample_weights=weights)])
        with pytest.raises(ValueError, match=words), learn.no_logging():
            learn.fit(1)


def test_weights_of_exits_follow_schedules():
    moving = [SchedLin(2.0, 0.0), 1.0, SchedLin(0.0, 1.0), 1.0]
    seen = []

    class Look(Callback):
        order = EEDCallback.order + 1

        def after_loss(self):
            if self.training:
                z, y = self.learn.exits.logits.detach(), self.yb[0]
                ws = [w(self.pct_train) if callable(w) else w for w in moving]
                expected = sum(w * F.cross_entropy(o, y) for w, o in zip(ws[:-1], z.unbind(1)))
                distance = sum(w * F.mse_loss(o, z.mean(1)) for w, o in zip(ws, z.unbind(1)))
                terms = self.learn.exit_terms
                seen.append((terms['exit_loss'] - expected, terms['logit_loss'] - distance))

    learn = learner([EEDCallback(label_weights=moving, logit_weights=moving), Look()])
    with learn.no_logging():
        learn.fit(2, 1e-3)
    assert len(seen) == 8 and all(abs(o) < 1e-4 for pair in seen for o in pair)


# --- what callbacks do to prediction, loss and gradients ------------------------------------------------------------

prior = torch.linspace(-1, 1, 10)


class AdjustLogits(Callback):
    "Logit adjustment, as for rare classes"

    order = EEDCallback.order + 1

    def after_pred(self):
        if self.training:
            self.learn.pred = self.pred + prior


def test_an_adjustment_of_all_logits_reaches_every_exit():
    grads, terms = first_step(AdjustLogits())
    expected = by_hand(lambda z, y: ce_sum(z + prior, y))
    assert_close(grads, expected)
    plain = first_step()[1]['exit_loss']
    assert abs(terms['exit_loss'] - plain) > 0.1


def test_the_hook_for_logits_is_the_same():
    learn = learner([EEDCallback(adjust_logits=lambda z: z + prior), FirstStep()])
    with learn.no_logging():
        learn.fit(1, 1e-3)
    assert_close(learn.first_step.grads, by_hand(lambda z, y: ce_sum(z + prior, y)))


class Sharpen(Callback):
    order = EEDCallback.order + 1

    def after_pred(self):
        self.learn.pred = self.pred * 2


class PenaltyBefore(Callback):
    order = 0

    def after_loss(self):
        if self.training:
            self.learn.loss_grad = self.loss_grad * 1.5


class LossAnew(Callback):
    order = EEDCallback.order + 1

    def after_loss(self):
        if self.training:
            self.learn.loss_grad = F.cross_entropy(self.pred, self.yb[0], label_smoothing=0.1)


class SecondPass(Callback):
    "Sharpness-aware minimisation, in its form for ordinary networks"

    def before_step(self):
        self.opt.zero_grad()
        self.loss_func(self.model(*self.xb), *self.yb).backward()


class SecondPassOfAllExits(Callback):
    def before_step(self):
        self.opt.zero_grad()
        self.learn.eed.loss().backward()


class Scale(Callback):
    order = EEDCallback.order + 1

    def after_loss(self):
        if self.training:
            self.learn.loss_grad = self.loss_grad * 0.5


@pytest.mark.parametrize('cb', [Sharpen, PenaltyBefore, LossAnew, SecondPass])
def test_what_does_not_reach_the_exits_is_said_and_named(cb):
    learn = learner([EEDCallback(), cb()])
    with pytest.warns(UserWarning, match=f'{cb.__name__} .*the other exits'), learn.no_logging():
        learn.fit(1, 1e-3)


@pytest.mark.parametrize(
    'cbs', [[], [AdjustLogits], [Scale], [SecondPassOfAllExits], [MixUp], [CutMix], [partial(GradientAccumulation, 32)]]
)
def test_what_reaches_the_exits_is_not_warned_of(cbs):
    learn = learner([EEDCallback(), *[cb() for cb in cbs]])
    with warnings.catch_warnings(record=True) as said, learn.no_logging():
        warnings.simplefilter('always')
        learn.fit(2, 1e-3)
    assert not [str(o.message) for o in said if 'exits' in str(o.message)]


def test_a_second_pass_has_the_gradients_of_all_exits():
    grads, _ = first_step(SecondPassOfAllExits())
    plain, _ = first_step()
    assert_close(grads, plain)


# --- refusals leave the Learner as it was ---------------------------------------------------------------------------


def works(learn):
    "Validate, predict and train"
    with learn.no_logging():
        first_of_all = learn.validate()
        assert len(first_of_all) == 1 + len(learn.metrics)
        learn.get_preds()
        learn.fit(1, 1e-3)
    assert not learn.lock.locked() and learn.logger is print


refused = dict(
    other_classes=lambda learn: setattr(learn.dls, 'c', 7),
    another_loss=lambda learn: setattr(learn, 'loss_func', MSELossFlat()),
    no_exits=lambda learn: setattr(learn, 'model', resnet18(num_classes=10)),
    weights=lambda learn: setattr(learn.eed, 'label_weights', [1, 2]),
    features=lambda learn: (
        setattr(learn.eed, 'beta', 1.0),
        setattr(learn, 'model', multi_exit(tiny_resnet, 10, head=PooledHead)),
    ),
    w=lambda learn: (setattr(learn.eed, 'logit_weights', [1] * 4), setattr(learn.eed, 'logit_loss', lambda z, t: 0)),
    teacher=lambda learn: setattr(learn.eed, 'teacher', nn.Linear(10, 10)),
    images_for_features=lambda learn: (
        setattr(learn.eed, 'beta', 1.0),
        setattr(learn.eed, 'teacher', ExternalTeacher(nn.Linear(2, 2))),
    ),
    two=lambda learn: learn.cbs.append(copy(learn.eed)),
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize('call', ['validate', 'get_preds', 'fit', 'validate_exits', 'get_exit_preds'])
@pytest.mark.parametrize('spoil', refused)
def test_a_refusal_leaves_the_learner_as_it_was(spoil, call):
    "Spoil a Learner, be refused, mend it, go on: no lock is left taken, no callback left over, no column lost"
    learn = make_learner(EEDCallback(), model=multi_exit(tiny_resnet, n_out=10))
    works(learn)
    names = ('model', 'loss_func')
    before = {o: getattr(learn, o) for o in names}
    cbs, of_cb, metrics, c = list(learn.cbs), dict(learn.eed.__dict__), list(learn.metrics), learn.dls.c
    refused[spoil](learn)
    with pytest.raises((ValueError, TypeError)), learn.no_bar():
        getattr(learn, call)(*([1] if call == 'fit' else []))
    for name, value in before.items():
        setattr(learn, name, value)
    learn.dls.c = c
    if spoil == 'two':
        learn.cbs.pop()
    assert list(learn.cbs) == cbs and [type(o) for o in learn.metrics] == [type(o) for o in metrics]
    for name in ('label_weights', 'logit_weights', 'logit_loss', 'teacher', 'beta'):
        setattr(learn.eed, name, of_cb[name])
    works(learn)


@pytest.mark.parametrize(
    'dls_kw,words', [(dict(lo=12), 'The targets go from'), (dict(dtype=torch.float32), 'one class per image')]
)
def test_a_refusal_in_a_batch_leaves_the_learner_as_it_was(dls_kw, words):
    learn = make_learner(EEDCallback(), model=multi_exit(tiny_resnet, n_out=10))
    y = torch.full((), dls_kw.get('lo', 1), dtype=dls_kw.get('dtype', torch.long))
    bad = DataLoaders.from_dsets([(torch.zeros(3, 32, 32), y)] * 4, [(torch.zeros(3, 32, 32), y)] * 4, bs=2)
    good, learn.dls = learn.dls, bad
    for call in (learn.validate, partial(learn.fit, 1), learn.get_preds):
        with pytest.raises(ValueError, match=words), learn.no_bar(), learn.no_logging():
            call()
    learn.dls = good
    works(learn)


def test_a_refused_callback_changes_nothing():
    learn = make_learner(model=multi_exit(tiny_resnet, head=PooledHead))
    state = [*learn.model.state_dict()]
    with pytest.raises(ValueError, match='their sizes are'):
        learn.add_cb(EEDCallback(beta=1.0))
    assert learn.model.n_out is None and [*learn.model.state_dict()] == state and not learn._grab_cbs(EEDCallback)
    learn.add_cb(EEDCallback())
    works(learn)


# --- who owns what --------------------------------------------------------------------------------------------------


def annealed():
    return EEDCallback(teacher=main_teacher, logit_loss=partial(AnnealedKL, max_prob=0.01))


def test_a_callback_for_every_fold_begins_anew():
    "One object, used for one fit in each of three Learners: each fold's temperature rises from 1"
    cb, rises = annealed(), []
    for _ in range(3):
        learn = make_learner(model=multi_exit(tiny_resnet, n_out=10))
        with learn.no_logging():
            learn.fit(2, 1e-3, cbs=cb)
        rises.append(int(cb._learned[1]['logit_loss'].rises))
    assert rises == [rises[0]] * 3 and rises[0] > 0
    assert cb.logit_loss.func is AnnealedKL  # what the user passed


def test_a_callback_in_two_learners_is_refused():
    cb = EEDCallback()
    one = make_learner(cb)
    with pytest.raises(ValueError, match='belongs to another Learner'):
        make_learner(cb)
    works(one)
    one.remove_cb(cb)
    works(make_learner(cb))


# --- teachers and losses that would learn nothing -------------------------------------------------------------------


class Learned(nn.Module):
    "A weighted mean of all exits"

    def __init__(self, k):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(k))

    def forward(self, z):
        return (self.theta.softmax(0)[:, None] * z).sum(1, keepdim=True)


class LearnedFromExits(Learned):
    learns_from_exits = True


def test_a_teacher_that_could_not_learn_is_refused_and_one_that_says_how_learns():
    with pytest.raises(ValueError, match='no way to learn.*loss.*learns_from_exits'):
        make_learner(EEDCallback(teacher=Learned))
    learn = make_learner(EEDCallback(teacher=LearnedFromExits))
    with learn.no_logging():
        learn.fit(1, 1e-2)
    assert learn.model.method['teacher'].theta.abs().max() > 0


@pytest.mark.parametrize(
    'loss,words',
    [
        (nn.MSELoss(), '1/4 of what is meant'),
        (nn.MSELoss(reduction='none'), 'gives shape'),
        (lambda z, t: 3.0, 'gives a float'),
        (lambda z, t: (z - t).square().mean() * float('nan'), 'gives nan'),
    ],
)
def test_a_distance_that_is_none_is_found_in_the_first_batch(loss, words):
    learn = make_learner(EEDCallback(logit_loss=loss))
    with pytest.raises(ValueError, match=words), learn.no_logging():
        learn.fit(1)
    learn.eed.logit_loss = logit_mse
    works(learn)


def test_a_loss_of_ones_own_that_sums_over_exits_is_fine():
    learn = make_learner(EEDCallback(logit_loss=lambda z, t: (z - t).abs().mean((0, 2)).sum()))
    works(learn)


# --- memory ---------------------------------------------------------------------------------------------------------


def resident_mb():
    "Megabytes of this process that are in memory"
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads /proc')
def test_three_hundred_batches_do_not_grow_the_process():
    "A batch's exits with their graph take more than a megabyte: a leak of them would be 300 MB"
    x = torch.randn(64, 3, 32, 32)
    dls = DataLoaders.from_dsets([(o, i % 10) for i, o in enumerate(x)], [], bs=64)
    learn = make_learner(
        EEDCallback(by_exit=True), dls=dls, model=multi_exit(tiny_resnet, 10), loss_func=CrossEntropyLossFlat()
    )
    sizes = []

    class Size(Callback):
        def after_epoch(self):
            sizes.append(resident_mb())

    with learn.no_logging():
        learn.fit(350, 1e-4, cbs=Size())
    assert sizes[-1] - sizes[49] < 60


# --- columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name,better', [('main_error_rate', min), ('main', max)])
def test_the_best_epoch_of_a_column_is_the_best(name, better):
    "fastai's trackers decide by a column's name whether less is better"
    learn = make_learner([EEDCallback(exit_metric=[accuracy, error_rate]), SaveModelCallback(monitor=name)])
    with learn.no_logging():
        learn.fit(4, 3e-2)
    values = [dict(zip(learn.recorder.metric_names[1:-1], row))[name] for row in learn.recorder.values]
    found = dict(zip(['valid_loss', *learn.metrics.attrgot('name')], learn.validate()))[name]
    assert abs(found - better(values)) < 1e-6


def test_no_columns_for_exits():
    learn = make_learner(EEDCallback(exit_metric=None))
    works(learn)
    assert learn.metrics.attrgot('name') == ['accuracy', 'exit_loss', 'logit_loss']


# --- data -----------------------------------------------------------------------------------------------------------


def tensors(n=24, soft=False, weights=False, ignored=0):
    "Images of noise, and targets"
    set_seed(1)
    y = torch.arange(n) % 10
    if ignored:
        y[:ignored] = -100
    targets = F.one_hot(y, 10).float() * 0.8 + 0.02 if soft else y
    more = (torch.rand(n),) if weights else ()
    return torch.utils.data.TensorDataset(torch.randn(n, 3, 32, 32), targets, *more)


def on(data, loss_func=None, metrics=None, raw=False, valid=True, **kw):
    "A Learner on these tensors"
    if raw:
        loaders = [torch.utils.data.DataLoader(o, batch_size=8, shuffle=True) for o in (copy(data), data)]
        dls = DataLoaders(*loaders)
    else:
        dls = DataLoaders.from_dsets(data, data if valid else [], bs=8)
        dls.n_inp = 1
    model = multi_exit(tiny_resnet, n_out=10)
    return Learner(dls, model, loss_func=loss_func or nn.CrossEntropyLoss(), metrics=metrics, cbs=EEDCallback(**kw))


def test_pytorchs_own_loaders():
    "Every call that looks at data takes them, in the order of the data set"
    data = tensors()
    learn = on(data, raw=True)
    with learn.no_logging(), learn.no_bar():
        learn.fit(1, 1e-3)
        p, y = learn.get_exit_preds()
        assert torch.equal(y, data.tensors[1]) and p.shape == (24, 4, 10)
        z, _ = learn.model.eval().all_exits(data.tensors[0])
        assert torch.allclose(p, z.softmax(-1), atol=1e-5)
        assert len(learn.exit_table()) == 5 and len(learn.grad_shares()) == 8
        policy = learn.fit_policy(budget=0.7)
        early, targets, idx = learn.predict_early(policy=policy)
        assert torch.equal(targets, y) and len(early) == len(idx) == 24
        assert len(learn.fit_policy(ms=1e4, bs=4).report) == 2


def test_rows_of_probabilities_as_targets():
    learn = on(tensors(soft=True))
    with learn.no_logging(), learn.no_bar():
        learn.fit(1, 1e-3)
        row = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
        table = learn.validate_exits().set_index('exit').accuracy
        assert abs(row['main'] - table['main']) < 1e-6 and len(learn.exit_table()) == 5


def test_a_second_target():
    "A weight for each image: the loss gets it, and `accuracy` does not take it for something else"

    def weighted_loss(z, y, w):
        return (w * F.cross_entropy(z, y, reduction='none')).mean()

    learn = on(tensors(weights=True), loss_func=weighted_loss)
    with learn.no_logging(), learn.no_bar():
        learn.fit(1, 1e-3)
        row = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
        assert abs(row['main'] - learn.validate_exits().set_index('exit').accuracy['main']) < 1e-6


def test_two_inputs_are_refused():
    learn = on(tensors(weights=True))
    learn.dls.n_inp = 2
    with pytest.raises(ValueError, match='2 inputs'), learn.no_logging():
        learn.fit(1)


def test_ignored_targets_are_not_counted():
    learn = on(tensors(ignored=8))
    with learn.no_bar():
        p, y = learn.get_exit_preds()
        counted = y != -100
        expected = (p[counted].argmax(-1) == y[counted][:, None]).float().mean(0)
        assert np.allclose(learn.validate_exits().accuracy[:4], expected, atol=1e-6) and counted.sum() == 16


def test_no_validation_set():
    learn = on(tensors(), valid=False)
    with learn.no_logging(), learn.no_bar():
        learn.fit(1, 1e-3)
        for call in (learn.validate_exits, learn.get_exit_preds, learn.exit_table, partial(learn.fit_policy, 0.5)):
            with pytest.raises(ValueError, match='validation'):
                call()


def test_one_class_is_refused():
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))
    dls = DataLoaders.from_dsets(data, data, bs=4)
    with pytest.raises(ValueError, match='There is one class'):
        Learner(dls, multi_exit(tiny_resnet, n_out=1), loss_func=nn.CrossEntropyLoss(), cbs=EEDCallback())
