"Packaging: everything that `settings.ini` says, and the version from `eed_fastai/__init__.py`."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
lines = lambda key: cfg[key].split('\n')[1:]

setup(
    version=re.search(r"__version__ = ['\"](.+?)['\"]", (here/cfg['lib_name']/'__init__.py').read_text(encoding='utf-8'))[1],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], keywords=cfg['keywords'].split(),
    classifiers=['Development Status :: 3 - Alpha', 'Framework :: Jupyter', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    python_requires='>=' + cfg['min_python'],
    install_requires=lines('requirements'),
    extras_require={name: lines(f'{name}_requirements') for name in cfg['extras'].split()},
    packages=find_packages(include=[cfg['lib_name'], cfg['lib_name'] + '.*']),
    entry_points={'console_scripts': lines('console_scripts'), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
)
