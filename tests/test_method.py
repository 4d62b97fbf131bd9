"The objective that really reaches the parameters, against one written by hand for this file."

import pytest
from conftest import *


def softmax(v):
    e = (v - v.max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)


def kl(z, t, T):
    return (softmax(t / T) * (softmax(t / T).log() - softmax(z / T).log())).sum(1).mean()


def soft_ce(z, t, T):
    return (
        -(softmax(t / T) * softmax(z / T).log()).sum(1).mean()
    )  # what the codes minimise: KL plus the teacher's entropy, which has no gradient


def entropy(t, T):
    return soft_ce(t, t, T).detach()


def ce(z, y):
    return -softmax(z).gather(1, y[:, None]).log().mean()


def mse(a, b):
    return ((a - b) ** 2).mean()


def flat(outs):
    return [o.flatten(1) for o in outs]


# --- methods as their authors write them, exit by exit --------------------------------------------------------------


def plain(zs, fs, y, model, x):
    return ce(zs[-1], y)


def branchynet(zs, fs, y, model, x):
    k = len(zs)
    return sum((1.0 + i / (k - 1) * (0.3 - 1.0)) * ce(zs[i], y) for i in range(k))


def phuong_lampert(zs, fs, y, T):
    k, main = len(zs), zs[-1].detach()
    C, scale = 0.5, 2 * 5 / k
    loss = (1 - C) * ce(zs[-1], y)
    for z in zs[:-1]:
        loss = loss + (1 - C) * ce(z, y) + C * T**2 * (soft_ce(z, main, T) - entropy(main, T))
    return scale * loss


def pl(zs, fs, y, model, x):
    return phuong_lampert(zs, fs, y, 1.05 ** int(model.method['logit_loss'].rises))


def pl_constant(zs, fs, y, model, x):
    return phuong_lampert(zs, fs, y, 4.0)


def byot(zs, fs, y, model, x):
    main, fs = zs[-1].detach(), flat(fs)
    loss = 0.9 * ce(zs[-1], y)
    for z, f in zip(zs[:-1], fs):
        mask = (f > 0) | (fs[-1].detach() > 0)
        loss = loss + 0.9 * ce(z, y) + 0.1 * 9 * (soft_ce(z, main, 3.0) - entropy(main, 3.0))
        loss = loss + 1e-6 * ((f - fs[-1].detach()) ** 2 * mask).sum()
    return loss


def beed(zs, fs, y, model, x):
    k, fs = len(zs), flat(fs)
    w = [1.6**i for i in range(k)]
    G, GF = (sum(a * o.detach() for a, o in zip(w, os)) / sum(w) for os in (zs, fs))
    loss = 0.0
    for i in range(1, k + 1):
        loss = loss + (2 - 1.15 ** (k - i)) * ce(zs[i - 1], y)
        loss = loss + 1.15 ** (k - i) * 9 * kl(zs[i - 1], G, 3.0) + 0.1 * mse(fs[i - 1], GF)
    return loss


def mate_style(zs, fs, y, model, x):
    k, lean, theta = len(zs), model.method['teacher'].lean, model.method['teacher'].theta
    loss = sum(ce(z, y) for z in zs)
    for m in range(k):
        e = (lean[m] + theta[m]).exp()
        V = sum(e[j] / e.sum() * zs[j].detach() for j in range(k))
        loss = loss + ce(V, y) + kl(zs[m].detach(), V, 3.0)  # the teacher's own part
        for i in range(k):
            loss = loss + (0.6 if i == m else 0.4 / (k - 1)) * kl(zs[i], V.detach(), 3.0)
    return loss


def hinton_kd(zs, fs, y, model, x):
    t = external(x)
    return sum(0.1 * ce(z, y) + 0.9 * 16 * kl(z, t, 4.0) for z in zs)


as_published = {f.__name__: f for f in (plain, branchynet, pl, pl_constant, byot, beed, mate_style, hinton_kd)}

# --- all others from their parts: what a teacher says, how a distance is measured -----------------------------------


def mean_of(outs, weights):
    return sum(w * o for w, o in zip(weights, outs)) / sum(weights)


def subset_by_hand(outs, idxs):
    chosen = {i % len(outs) for i in idxs}
    return sum(outs[i] for i in chosen) / len(chosen)


teachers_by_hand = {  # of the library's function: outputs of all exits, keywords of a `partial` → one target
    'main_teacher': lambda outs: outs[-1],
    'ensemble_teacher': lambda outs: sum(outs) / len(outs),
    subset_teacher([0]).func.__name__: subset_by_hand,
    weighted_teacher([1]).func.__name__: mean_of,
    growing_teacher(2).func.__name__: lambda outs, base: mean_of(outs, [base**i for i in range(len(outs))]),
}
distances_by_hand = {  # of the library's function: one exit's output, its target, keywords → one number
    'logit_mse': mse,
    'logit_kl': lambda z, t, T=3.0: kl(z, t, T),
    'feat_mse': mse,
    'feat_sse': lambda f, u: ((f - u) ** 2).sum(),
}


def counterpart(table, part):
    "The independent form of a part of a recipe, with the keywords that the recipe fixes"
    name = getattr(part, 'func', part).__name__
    if name not in table:
        raise LookupError(f'{name} has no independent form in this file: write one, and put it into the table')
    return partial(table[name], **getattr(part, 'keywords', {}))


def from_parts(recipe, zs, fs, y):
    "The loss of a recipe, put together from the parts that it names"
    teacher, k = counterpart(teachers_by_hand, recipe['teacher']), len(zs)
    distance = counterpart(distances_by_hand, recipe['logit_loss'])
    of_labels, of_logits = (
        [1.0] * k if recipe.get(o) is None else recipe[o](k) for o in ('label_weights', 'logit_weights')
    )
    loss = sum(w * ce(z, y) for w, z in zip(of_labels, zs))
    if recipe['alpha']:
        t = teacher([z.detach() for z in zs])
        loss = loss + recipe['alpha'] * sum(w * distance(z, t) for w, z in zip(of_logits, zs))
    if recipe.get('beta'):
        u = teacher([f.detach() for f in flat(fs)])
        between = counterpart(distances_by_hand, recipe['feat_loss'])
        loss = loss + recipe['beta'] * sum(between(f, u) for f in flat(fs))
    return loss


def by_hand(name, zs, fs, y, model=None, x=None):
    "The loss of the recipe called `name`, independently of the library"
    if name in as_published:
        return as_published[name](zs, fs, y, model, x)
    return from_parts(recipes[name], zs, fs, y)


def test_a_part_without_an_independent_form_is_an_error(monkeypatch):
    "A recipe of a new kind is not checked as if it were an old one, whatever its name"

    def geometric_teacher(z):
        return z.log_softmax(-1).mean(1, keepdim=True)

    z, y = torch.randn(8, 3, 5, dtype=torch.float64), torch.randint(5, (8,))
    outs = list(z.unbind(1))
    monkeypatch.setitem(recipes, 'eed_mse_too', recipes['eed_mse'] | dict(teacher=geometric_teacher))
    with pytest.raises(LookupError, match='geometric_teacher'):
        by_hand('eed_mse_too', outs, outs, y)
    monkeypatch.setitem(teachers_by_hand, 'geometric_teacher', lambda outs: sum(softmax(o).log() for o in outs) / 3)
    t = geometric_teacher(z)
    assert abs(by_hand('eed_mse_too', outs, outs, y) - exit_ce(z, y) - logit_mse(z, t)) < 1e-10


@pytest.mark.parametrize('name', [*subset_recipes()])
def test_subset_recipes_are_their_parts(name):
    recipe = subset_recipes()[name]
    z, y = torch.randn(8, 4, 5, dtype=torch.float64), torch.randint(5, (8,))
    idxs = [3 if o == 'main' else int(o) for o in name.split('_')[1:]]
    expected = sum(ce(o, y) + mse(o, sum(z[:, i] for i in idxs) / len(idxs)) for o in z.unbind(1))
    outs = list(z.unbind(1))
    assert abs(from_parts(recipe, outs, outs, y) - expected) < 1e-10
    assert abs(exit_ce(z, y) + recipe['logit_loss'](z, recipe['teacher'](z)) - expected) < 1e-10


external_net = tiny_resnet(n_out=10).eval()


def external(x):
    return deepcopy(external_net).to(x.dtype)(x).detach()


def keywords(recipe, dtype=torch.float32):
    return recipes[recipe] | (
        {'teacher': ExternalTeacher(deepcopy(external_net).to(dtype))} if recipe == 'hinton_kd' else {}
    )


@pytest.mark.parametrize('recipe', recipes)
def test_every_recipe_is_its_equations(recipe):
    "Loss and gradient of every parameter, in float64, from a state that is not the first"
    model = multi_exit(tiny_resnet, n_out=10, head=recipes[recipe].head).double()
    learn = make_learner(
        EEDCallback(**keywords(recipe, torch.float64)), model=model, loss_func=nn.CrossEntropyLoss()
    )  # fastai's flat one is off by 3e-7 in float64
    if recipe == 'pl':
        model.method['logit_loss'].rises += 7
    if recipe == 'mate_style':
        nn.init.normal_(model.method['teacher'].theta)
    xb, yb = (o.as_subclass(Tensor) for o in learn.dls.one_batch())
    xb = xb.double()
    # the callback makes outputs float32; here they stay float64, so that the comparison is exact
    zs, fs = zip(*model_outputs(model.train(), xb))
    learn.xb, learn.yb, learn.training = (xb,), (yb,), False  # not training: a temperature stays
    cb = learn._grab_cbs(EEDCallback)[0]
    objective = cb.objective()
    outs = stack_exits(zip(zs, fs))
    terms = objective.terms(*outs, (yb,), objective.targets(*outs, xb))
    loss = objective.main_loss(F.cross_entropy(zs[-1], yb)) + sum(terms.values())
    ours = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    expected = by_hand(recipe, zs, fs, yb, model, xb)
    theirs = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    assert abs(loss - expected) < 1e-10 * max(1, abs(expected))
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() < 1e-10 * max(1, b.abs().max())


def model_outputs(model, x):
    for stage, head in model:
        x = stage(x)
        yield head(x)


@pytest.mark.parametrize(
    'recipe',
    [
        'joint_ce',
        'eed_mse_feat',
        'eed_kl_code',
        'main_kl_feat',
        'plain',
        'pl',
        'byot',
        'beed',
        'mate_style',
        'hinton_kd',
    ],
)
def test_a_real_step_has_these_gradients(recipe):
    "The same through a real fit, in float32: the gradients of the first step"
    grads = []

    class Keep(Callback):
        order = 100

        def before_step(self):
            grads.append([None if p.grad is None else p.grad.clone() for p in self.model.parameters()])
            raise CancelFitException()

    dls = small_digits()
    dls.train = dls.train.new(shuffle=False)
    learn = make_learner(
        [EEDCallback(**keywords(recipe)), Keep()],
        dls=dls,
        model=multi_exit(tiny_resnet, n_out=10, head=recipes[recipe].head),
    )
    start = deepcopy(learn.model)
    with learn.no_logging():
        learn.fit(1)
    xb, yb = (o.as_subclass(Tensor) for o in first(dls.train))
    zs, fs = zip(*model_outputs(start.train(), xb))
    expected = torch.autograd.grad(by_hand(recipe, zs, fs, yb, start, xb), list(start.parameters()), allow_unused=True)
    for a, b in zip(grads[0], expected):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a, b, rtol=2e-3, atol=2e-5 * max(1, b.abs().max()))


def test_a_broken_sign_would_be_seen():
    "The comparison above can fail: the wrong teacher, weight or sign is far outside its bounds"
    z = torch.randn(8, 3, 5, dtype=torch.float64)
    y = torch.randint(5, (8,))
    right = by_hand('eed_mse', list(z.unbind(1)), list(z.unbind(1)), y)
    for wrong in (
        exit_ce(z, y) - logit_mse(z, ensemble_teacher(z)),
        exit_ce(z, y) + logit_mse(z, main_teacher(z)),
        exit_ce(z, y) + 0.9 * logit_mse(z, ensemble_teacher(z)),
    ):
        assert abs(wrong - right) > 1e-3
    assert abs(exit_ce(z, y) + logit_mse(z, ensemble_teacher(z)) - right) < 1e-10


def test_alpha_and_beta_zero_is_joint_ce():
    runs = []
    for kw in (
        dict(alpha=0.0, beta=0.0),
        dict(alpha=0.0, beta=0.0, teacher=main_teacher, logit_loss=logit_kl),
        recipes['joint_ce'],
    ):
        set_seed(3)
        learn = make_learner(EEDCallback(**kw), model=multi_exit(tiny_resnet, n_out=10))
        with learn.no_logging():
            learn.fit(1)
        runs.append(torch.cat([p.flatten() for p in learn.model.parameters()]).detach())
        assert set(learn.metrics.attrgot('name')) & {'logit_loss', 'feat_loss'} == set()
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


published_weights = {  # name → weight of logits and of features: EED paper, Table I and eqs. 2 to 8; its `train.py`
    'joint_ce': (0.0, 0.0),
    **{f'{who}_{loss}': (1.0, 0.0) for who in ('main', 'eed') for loss in ('kl', 'mse')},
    **{f'{who}_{loss}_feat': (1.0, 1.0) for who in ('main', 'eed') for loss in ('kl', 'mse')},
    'eed_kl_code': (0.9, 0.0),
    'eed_kl_feat_code': (0.9, 1.0),
    'eed_mse_code': (1.0, 0.0),
    'eed_mse_feat_code': (1.0, 1.0),
}


def test_recipes_have_sources():
    assert set(recipes) >= {*published_weights, *as_published}
    assert all(r.source and r.status in ('paper', 'code', 'reconstruction') for r in recipes.values())
    assert 'MATE-style (reconstructed)' in recipes['mate_style'].source


@pytest.mark.parametrize('name', published_weights)
def test_the_papers_recipes_are_made_of_the_papers_parts(name):
    recipe, (alpha, beta) = recipes[name], published_weights[name]
    assert (recipe['alpha'], recipe['beta']) == (alpha, beta)
    assert recipe.get('label_weights') is None and recipe.get('logit_weights') is None
    if alpha:
        assert recipe['teacher'] is (main_teacher if name.startswith('main') else ensemble_teacher)
        loss = recipe['logit_loss']
        assert loss is logit_mse if 'mse' in name else (loss.func, loss.keywords) == (logit_kl, dict(T=3.0))
    if beta:
        assert recipe['feat_loss'] is feat_mse


def test_the_annealed_temperature_follows_the_code():
    "A loop over batches, as `main.py` has it: the loss first, then the temperature"
    torch.manual_seed(0)
    loss, T = AnnealedKL().double(), 1.0
    for _ in range(60):
        t = 3 * torch.randn(8, 1, 5, dtype=torch.float64)
        assert abs(loss(t * 0.5, t) - T**2 * kl(t[:, 0] * 0.5, t[:, 0], T)) < 1e-10
        if softmax(t[:, 0] / T).max(1).values.mean() > 0.5:
            T *= 1.05
        loss.update(t)
    assert 1.05 < T < 10 and abs(loss.temperature(torch.float64) - T) < 1e-10


def test_plain_is_a_learner_without_the_callback():
    "Bit for bit, and without running the heads"
    weights, calls = [], []
    for cbs in (None, EEDCallback(**recipes['plain'])):
        set_seed(3)
        learn = make_learner(cbs, model=multi_exit(tiny_resnet, n_out=10))
        learn.model.heads[0].register_forward_hook(lambda m, *_: calls.append(m.training))
        with learn.no_logging():
            learn.fit(2, 1e-2)
        weights.append(torch.cat([v.flatten().float() for v in learn.model.state_dict().values()]))
    assert torch.equal(*weights)
    assert calls and not any(calls)  # in validation, for the columns


def test_the_main_networks_weight_counts_even_alone():
    losses = []
    for w in ([0, 0, 0, 1], [0, 0, 0, 0.5]):
        set_seed(0)
        learn = make_learner(EEDCallback(alpha=0.0, label_weights=w), model=multi_exit(tiny_resnet, n_out=10))
        with learn.no_logging():
            learn.fit(1, 1e-6)
        losses.append(learn.recorder.values[-1][0])
    assert abs(losses[1] / losses[0] - 0.5) < 1e-2


def test_grad_shares_of_a_frozen_body_and_of_a_loss_of_ones_own():
    learn = make_learner(EEDCallback(), model=multi_exit(tiny_resnet, n_out=10), splitter=exit_splitter)
    learn.freeze()
    assert (learn.grad_shares().grad_norm > 0).all() and not learn.model.stages[0].stem_0.weight.requires_grad
    learn = make_learner(
        EEDCallback(logit_loss=lambda z, t: (z - t).abs().mean()), model=multi_exit(tiny_resnet, n_out=10)
    )
    with pytest.raises(ValueError, match='takes no `w`'):
        learn.grad_shares()


def test_grad_shares_take_any_loss_and_leave_the_learner_alone():
    "Plain tensors inside, as in a fit, so that torch's own losses work; nothing of the Learner changes"
    learn = make_learner(EEDCallback(), model=multi_exit(tiny_resnet, n_out=10), loss_func=nn.CrossEntropyLoss())
    before = dict(learn.__dict__)
    assert abs(learn.grad_shares().share.sum() - 1) < 1e-6
    assert learn.__dict__ == before and learn.eed.learn is learn


def test_six_exits_have_no_negative_weight():
    assert min(EEDCallback(**recipes['beed']).label_weights(7)) == 0.0 and recipes['branchynet']['label_weights'](
        1
    ) == [1.0]


def remembering(recipe):
    return recipes[recipe] | (
        {'logit_loss': partial(AnnealedKL, max_prob=0.1)} if recipe == 'pl' else {}
    )  # so that a short fit raises the temperature


def trained(recipe, **kw):
    learn = make_learner(EEDCallback(**remembering(recipe)), **kw)
    with learn.no_logging():
        learn.fit(2, 1e-2)
    return learn


@pytest.mark.parametrize('recipe,name', [('pl', 'method.logit_loss.rises'), ('mate_style', 'method.teacher.theta')])
def test_what_a_method_remembers(recipe, name, tmp_path):
    "Save and load, pickle, copies, a plain network, and going on after a cut"
    learn = trained(recipe, path=tmp_path)
    state = learn.model.state_dict()[name].clone()
    assert state.abs().sum() > 0
    learn.save('it')
    other = make_learner(EEDCallback(**remembering(recipe)), path=tmp_path).load('it')
    assert torch.equal(other.model.state_dict()[name], state)
    make_learner(path=tmp_path, model=multi_exit(tiny_resnet, n_out=10)).load(
        'it', with_opt=False
    )  # answers, and needs no memory
    learn.export('it.pkl')
    loaded = load_learner('it.pkl')
    assert torch.equal(loaded.model.state_dict()[name], state)
    with learn.no_logging():
        learn.fit(1, 1e-2)  # a second fit goes on
    assert not torch.equal(learn.model.state_dict()[name], state) and learn.model.method is not None
    cb = learn._grab_cbs(EEDCallback)[0]
    state = learn.model.state_dict()[name].clone()
    learn.remove_cb(cb)
    assert name not in learn.model.state_dict()
    learn.add_cb(cb)  # what it learned came along
    assert torch.equal(learn.model.state_dict()[name], state)


@pytest.mark.parametrize('recipe', ['pl', 'mate_style'])
def test_a_resumed_fit_is_the_uncut_one(recipe, tmp_path):
    "Four epochs at once, and two and two with a save, a new Learner and a load between them: the same weights"

    def learner():
        return make_learner(
            EEDCallback(**remembering(recipe)), path=tmp_path, dls=dls, model=multi_exit(tiny_resnet, n_out=10)
        )

    dls = small_digits()
    dls.train = dls.train.new(shuffle=False)
    set_seed(0)
    whole = learner()
    with whole.no_logging():
        whole.fit(4, 1e-2)
    set_seed(0)
    half = learner()
    with half.no_logging():
        half.fit(2, 1e-2)
    half.save('half')
    rest = learner().load('half')
    with rest.no_logging():
        rest.fit(4, 1e-2, start_epoch=2)
    for a, b in zip(whole.model.state_dict().values(), rest.model.state_dict().values()):
        assert torch.allclose(a.float(), b.float(), atol=1e-5)


def test_mate_style_teachers_stay_different():
    "No two teachers are the same, each exit's primary is nearer to it, theta learns from the teachers' loss alone"
    learn = make_learner(EEDCallback(**recipes['mate_style']), dls=digits_dls(), model=multi_exit(tiny_resnet))
    with learn.no_logging():
        learn.fit_one_cycle(4, 1e-2)
    teacher = learn.model.method['teacher']
    w = teacher.weights.detach()
    apart = (w[:, None] - w[None]).abs().sum(-1) / 2  # total variation between teachers, 0…1
    off = ~torch.eye(len(w), dtype=bool)
    assert apart[off].min() > 0.1
    assert torch.allclose(w.sum(1), torch.ones(len(w))) and teacher.theta.abs().max() > 0.01
    z, _ = learn.model.eval().all_exits(learn.dls.valid.one_batch()[0])
    far = torch.tensor([[kl(z[:, i], v, 3.0) for v in teacher(z).unbind(1)] for i in range(len(w))])
    assert (far.diag() < far.mean(1)).all()
    # where gradients go
    cb = learn._grab_cbs(EEDCallback)[0]
    learn.model.train()
    learn.training = True
    b = learn.dls.train.one_batch()
    learn.xb, learn.yb = (b[0],), (b[1].as_subclass(Tensor),)
    x = b[0].as_subclass(Tensor)
    outs = learn.model.all_exits(x)
    objective = cb.objective()
    terms = objective.terms(*outs, learn.yb, objective.targets(*outs, x))
    net = [*learn.model.stages.parameters(), *learn.model.heads.parameters()]
    for name, term in terms.items():
        grads = torch.autograd.grad(term, [teacher.theta, *net], retain_graph=True, allow_unused=True)
        assert (grads[0] is not None) == (name == 'teacher_loss')
        assert any(g is not None for g in grads[1:]) == (name != 'teacher_loss')


def test_by_exit_columns_add_up():
    learn = make_learner(
        EEDCallback(**{**recipes['beed'], 'by_exit': True}), model=multi_exit(tiny_resnet, n_out=10, head=BEEDHead)
    )
    with learn.no_logging():
        learn.fit(1, 1e-2)
    row = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
    for term in ('exit_loss', 'logit_loss', 'feat_loss'):
        parts = [v for k, v in row.items() if k.startswith(f'{term}.')]
        assert len(parts) == 4 - (term == 'exit_loss') and abs(sum(parts) - row[term]) < 1e-3 * row[term]


def test_grad_shares_against_backward():
    "The lengths are those of an ordinary backward of each part"
    learn = make_learner(EEDCallback(), model=multi_exit(tiny_resnet, n_out=10))
    batch = learn.dls.train.one_batch()
    df = learn.grad_shares(SimpleNamespace(one_batch=lambda: batch))
    model = deepcopy(learn.model).train()
    z, _ = model.all_exits(batch[0].as_subclass(Tensor))
    mse(z[:, 1], z.detach().mean(1)).backward()
    length = torch.cat([p.grad.flatten() for p in model.stages.parameters() if p.grad is not None]).norm().item()
    assert abs(df[(df.term == 'logit_loss') & (df.exit == 'exit1')].grad_norm.item() - length) < 1e-3 * length
    assert abs(df.share.sum() - 1) < 1e-6 and all(p.grad is None for p in learn.model.parameters())


def test_schedules():
    "alpha follows fastai's schedule through the fit"
    seen = []

    class Watch(Callback):
        order = EEDCallback.order + 1

        def after_loss(self):
            if self.training:
                seen.append(
                    (
                        self.pct_train,
                        float(self.exit_terms.get('logit_loss', 0.0))
                        / float(logit_mse(self.exits.logits, ensemble_teacher(self.exits.logits))),
                    )
                )

    learn = make_learner([EEDCallback(alpha=SchedCos(0.0, 2.0)), Watch()], model=multi_exit(tiny_resnet, n_out=10))
    with learn.no_logging():
        learn.fit(2, 1e-3)
    assert len(seen) == 8 and all(abs(a - SchedCos(0.0, 2.0)(p)) < 1e-4 for p, a in seen) and seen[-1][1] > 1.5


def test_digits_are_learned_by_every_exit():
    "A short real run: the first exit learns too, and the ensemble is no worse than the worst exit"
    learn = make_learner(EEDCallback(), dls=digits_dls(), model=multi_exit(partial(cifar_resnet18, width=16)))
    with learn.no_logging():
        learn.fit_one_cycle(4, 1e-2)
    df = learn.validate_exits().set_index('exit').accuracy
    assert df['exit0'] > 0.9 and df['main'] > 0.95 and df['ensemble'] >= df.min()
