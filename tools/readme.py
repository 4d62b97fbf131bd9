"Make README.md and its pictures from nbs/index.ipynb: `python tools/readme.py`."
import re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
images = 'nbs/images'

def visible(cell):
    "The cell as a reader sees it, or None; directives as nbdev has them"
    if cell.cell_type!='code': return cell
    lines = cell.source.split('\n')
    flags = [o[2:].strip() for o in lines if o.startswith('#|')]
    if 'hide' in flags: return None
    cell.source = '\n'.join(o for o in lines if not o.startswith('#|'))
    if 'echo: false' in flags: cell.metadata['tags'] = ['hide-input']
    return cell

def from_root(text):
    "Links that are right in nbs/, made right in the folder above"
    text = re.sub(r'\]\((?!\.\./|https?:|nbs/|#)([^)]+)\)', r'](nbs/\1)', text)
    return text.replace('](../', '](')

def make():
    "The text of README.md, and a dictionary of picture paths and bytes"
    nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
    nb.cells = [c for c in map(visible, nb.cells) if c is not None]
    nb.metadata['language_info'] = {'name': 'python'}
    exporter = MarkdownExporter(config={'TagRemovePreprocessor': {'enabled': True, 'remove_input_tags': ['hide-input']}})
    text,resources = exporter.from_notebook_node(nb, resources={'unique_key': 'index', 'output_files_dir': 'images'})
    text = re.sub(r'!\[png\]\(', '![Conventional self-distillation beside exit-ensemble distillation](', from_root(text))
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', {f'nbs/{k}': v for k,v in resources['outputs'].items()}

if __name__=='__main__':
    text,pictures = make()
    (root/images).mkdir(exist_ok=True)
    for old in (root/images).glob('index_*'): old.unlink()
    for path,data in pictures.items(): (root/path).write_bytes(data)
    (root/'README.md').write_text(text, encoding='utf-8')
