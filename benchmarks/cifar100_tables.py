"The columns of a row of CIFAR-100, the paper's tables, and both beside each other."

from fastai.vision.all import *

from eed_fastai.compare import comparison_table, mean_sd

__all__ = ['here', 'exits', 'train_columns', 'columns', 'published', 'ours', 'side_by_side', 'paired_summary']

here = Path(__file__).resolve().parent
n_early = 3     # exits before the main one that a row has room for

# --- columns of a row -------------------------------------------------------------------------------------------------

exits = [*[f'exit{i}' for i in range(n_early)], 'main', 'ensemble']
train_columns = [f'train_{e}' for e in exits]
columns = [
    'dataset', 'network', 'width', 'recipe', 'protocol', 'epochs', 'seed',
    'commit', 'hardware', 'torch', 'seconds', 'peak_memory',
    *exits, 'best_epoch', 'best_main', *[f'nll_{e}' for e in exits], *[f'ece_{e}' for e in exits],
    'schedule', 'lr', 'wd', 'bs', 'nesterov', 'amp', 'channels_last', 'compile',
    'n_train', 'n_judge', 'joules', *train_columns,
    'fastai', 'torchvision', 'python', 'eed_fastai', 'run',
]

# --- the paper's tables -----------------------------------------------------------------------------------------------

# The paper's method, loss of the outputs and β → our recipe
methods = {
    ('Baseline', 'CE', None): 'plain',
    ('BranchyNet', 'CE', 0): 'joint_ce',
    ('PL', 'KL', 0): 'main_kl',
    ('PL', 'MSE', 0): 'main_mse',
    ('BYOT', 'KL', 1): 'main_kl_feat',
    ('BYOT', 'MSE', 1): 'main_mse_feat',
    ('EED', 'KL', 0): 'eed_kl',
    ('EED', 'KL', 1): 'eed_kl_feat',
    ('EED', 'MSE', 0): 'eed_mse',
    ('EED', 'MSE', 1): 'eed_mse_feat',
}

# Table IV's teachers → our recipe; the paper counts exits from 1
teachers = {
    'Main': 'main_mse',
    'Exit1+Main': 'subset_0_main',
    'Exit3+Main': 'subset_2_main',
    'Exit1+Exit3+Main': 'subset_0_2_main',
    'Exit1+Exit2+Exit3': 'subset_0_1_2',
    'Exit1+Exit2+Exit3+Main': 'eed_mse',
}

networks = {
    'VGG19': 'vgg19',
    'ResNet-18': 'resnet18',
    'ResNet-50': 'resnet50',
    'ResNet-101': 'resnet101',
    'ResNet-152': 'resnet152',
    'ResNeXt29-4': 'resnext29',
    'WideResNet28-10': 'wrn28_10',
    'PyramidNet110-270': 'pyramidnet110',
}

def recipe_of_table_1(row):
    "Recipe of a row of Table I, which names the loss and β"
    beta = None if pd.isna(row.beta) else int(row.beta)
    return methods[row.method, row.output_loss, beta]

def recipe_of_table_2(row):
    "Recipe of a row of Table II, where all distillation is by KL and without features"
    loss = 'CE' if row.method=='BranchyNet' else 'KL'
    return methods[row.method, loss, 0]

def published(table):
    "The paper's Table I, II or IV: network, recipe, and accuracies"
    df = pd.read_csv(here/'published'/f'table{table}.csv')
    if table==1:
        df['recipe'] = [recipe_of_table_1(row) for row in df.itertuples()]
    if table==2:
        df = df[df.dataset=='CIFAR-100']
        df['recipe'] = [recipe_of_table_2(row) for row in df.itertuples()]
    if table==4:
        df['network'] = 'ResNet-18'
        df['recipe'] = df.teacher.map(teachers)
    df['network'] = df.network.map(networks)
    counted_from_0 = {f'exit{i+1}': f'exit{i}' for i in range(n_early)}
    return df.rename(columns=counted_from_0).reset_index(drop=True)

# --- ours beside them -------------------------------------------------------------------------------------------------

def ours(results, **fixed):
    "Our rows, or those of them that have the values of `fixed`"
    file = results/'cifar100.csv'
    if not file.exists():
        return pd.DataFrame(columns=columns)
    df = pd.read_csv(file)
    for column, value in fixed.items():
        df = df[df[column]==value]
    return df

def by_schedule(df):
    "Pairs of a schedule in words and its rows; one pair without words where there is no row"
    if len(df)==0:
        return [(' ', df)]
    return [(f'{schedule} {epochs}', rows) for (schedule, epochs), rows in df.groupby(['schedule', 'epochs'])]

def pair_cells(row, mine):
    "Exit → published accuracy and ours, for the exits that the published row has"
    accuracies = {e: getattr(row, e, np.nan) for e in exits if e!='ensemble'}
    return {e: f"{a:.2f} | {mean_sd(mine[e], 'not yet run')}" for e, a in accuracies.items() if not pd.isna(a)}

def side_by_side(table, results):
    "Published and ours, a row of the paper's table each; ours in mean ± standard deviation (seeds), by schedule"
    mine = ours(results, dataset='cifar100', protocol='report')
    mine = mine[mine.width.isna()]
    rows = []
    for row in published(table).itertuples():
        same = mine[(mine.network==row.network) & (mine.recipe==row.recipe)]
        for schedule, runs in by_schedule(same):
            rows.append(dict(network=row.network, recipe=row.recipe, schedule=schedule, **pair_cells(row, runs)))
    return pd.DataFrame(rows).fillna('')

def paired_summary(results):
    "For each setting and recipe: mean, standard deviation, pairs, and main's difference from joint CE and from plain"
    setting = ['dataset', 'network', 'width', 'protocol', 'schedule', 'epochs']
    tables = [pd.DataFrame(columns=[*setting, 'recipe', *exits])]
    for key, runs in ours(results).groupby([*setting, 'lr', 'bs', 'hardware'], dropna=False):
        table = comparison_table(runs, ['joint_ce', 'plain']).drop(columns='seconds')
        tables.append(table.assign(**dict(zip(setting, key))))
    if len(tables)==1:
        return tables[0]
    return pd.concat(tables).dropna(axis=1, how='all').fillna('')
