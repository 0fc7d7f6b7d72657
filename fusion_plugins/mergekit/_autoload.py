"""Makes stock mergekit know our methods: it discovers no plugins, so we act on its imports.

``fusion_plugins_mergekit.pth`` calls :func:`install` at interpreter start. That adds one finder to ``sys.meta_path``
which waits for the modules of :data:`HOOKS`; when one has been imported, it calls our function with the module. An
interpreter that never imports mergekit pays for one dictionary look-up per import. Whatever goes wrong in a hook is a
warning: mergekit itself must keep working. Only modules that every interpreter has loaded anyway are imported here.
"""

import sys

__all__ = ["HOOKS", "install"]

#: mergekit module -> (our module, function that is called with the imported mergekit module)
HOOKS = {
    "mergekit.merge_methods.registry": ("fusion_plugins.mergekit.methods", "register_methods"),
    "mergekit.merge": ("fusion_plugins.mergekit.patches", "extend_merge"),
    "mergekit.scripts.merge_raw_pytorch": ("fusion_plugins.mergekit.patches", "extend_raw_merge"),
}


class _Finder:
    """Finds the modules of :data:`HOOKS`, once each, through the other finders."""

    def __init__(self, pending):
        self.pending = pending

    def find_spec(self, name, path=None, target=None):
        if name not in self.pending:
            return None
        hook = self.pending.pop(name)
        if not self.pending:
            sys.meta_path.remove(self)
        spec = _find_elsewhere(self, name, path, target)
        if spec is not None and spec.loader is not None:
            _call_after(spec.loader, hook)
        return spec


def install():
    """Wait for mergekit's modules, or act at once on those that are imported already."""
    pending = dict(HOOKS)
    for name in HOOKS:
        if name in sys.modules:
            _run(pending.pop(name), sys.modules[name])
    if pending and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(pending))


def _find_elsewhere(this, name, path, target):
    for finder in list(sys.meta_path):
        find_spec = getattr(finder, "find_spec", None)
        if finder is not this and find_spec is not None:
            spec = find_spec(name, path, target)
            if spec is not None:
                return spec
    return None


def _call_after(loader, hook):
    execute = loader.exec_module

    def exec_module(module):
        loader.exec_module = execute
        execute(module)
        _run(hook, module)

    loader.exec_module = exec_module


def _importing(name):
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return getattr(spec, "_initializing", False)


def _run(hook, module):
    if _importing(hook[0]):
        # It was imported before mergekit and is what imports mergekit now; it acts on mergekit itself when it is done.
        return
    try:
        ours = __import__(hook[0], fromlist=[hook[1]])
        getattr(ours, hook[1])(module)
    except Exception as error:
        import warnings

        warnings.warn(
            f"fusion_plugins could not extend {module.__name__}: {type(error).__name__}: {error}. mergekit works as "
            "without fusion_plugins; install a mergekit of the range that `pip show fusion-plugins` names.",
            RuntimeWarning,
            stacklevel=2,
        )
