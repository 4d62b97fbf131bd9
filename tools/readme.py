"Make README.md and its pictures from nbs/index.ipynb: `python tools/readme.py`."

import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
images = 'nbs/images'
picture_text = 'Conventional self-distillation beside exit-ensemble distillation'

def visible(cell):
    "The cell as a reader sees it, or None; directives as nbdev has them"
    if cell.cell_type!='code':
        return cell
    lines = cell.source.split('\n')
    flags = [line[2:].strip() for line in lines if line.startswith('#|')]
    if 'hide' in flags:
        return None
    cell.source = '\n'.join(line for line in lines if not line.startswith('#|'))
    if 'echo: false' in flags:
        cell.metadata['tags'] = ['hide-input']
    return cell

def from_root(text):
    "Links that are right in nbs/, made right in the folder above"
    text = re.sub(r'\]\((?!\.\./|https?:|nbs/|#)([^)]+)\)', r'](nbs/\1)', text)
    return text.replace('](../', '](')

def make():
    "The text of README.md, and a dictionary of picture paths and bytes"
    nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
    nb.cells = [cell for cell in map(visible, nb.cells) if cell is not None]
    nb.metadata['language_info'] = {'name': 'python'}
    without_code = {'TagRemovePreprocessor': {'enabled': True, 'remove_input_tags': ['hide-input']}}
    exporter = MarkdownExporter(config=without_code)
    names = {'unique_key': 'index', 'output_files_dir': 'images'}
    text, resources = exporter.from_notebook_node(nb, resources=names)
    text = from_root(text).replace('![png](', f'![{picture_text}](')
    text = re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'
    pictures = {f'nbs/{name}': data for name, data in resources['outputs'].items()}
    return text, pictures

def write(text, pictures):
    "Write README.md and its pictures, in place of those that are there"
    (root/images).mkdir(exist_ok=True)
    for old in (root/images).glob('index_*'):
        old.unlink()
    for path, data in pictures.items():
        (root/path).write_bytes(data)
    (root/'README.md').write_text(text, encoding='utf-8')

if __name__=='__main__':
    write(*make())
