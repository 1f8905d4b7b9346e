"""Names of a checkpoint's tensors and layers in the model: as they are, or by transformers' own tables of older names.

Vision-language models changed theirs (language_model.model.layers.0 is model.language_model.layers.0 now), and most
published folders have the old ones. Each model class of transformers has its renamings; they are asked, not copied.
"""

from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..nn.experts import model_name, split_, stack_of


class Names:
    """The names of one model, on the meta device or not.

    known : every name of its state_dict; of split experts those of each
    changed : {owner in the file: owner in the model} of the tensors that were asked for and are named otherwise;
        {name in the file: name in the model} of those that no part of the file owns
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.changed: dict[str, str] = {}
        self.known: dict[str, bool] = dict.fromkeys(model.state_dict(), True)
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._own = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._renamings = [*self._own, *(get_checkpoint_conversion_mapping("legacy") or ())]

    def __call__(self, name: str) -> str:
        """The name in the model of a file's tensor; as it is where the model has none of this name."""
        plain = model_name(name)
        found = plain
        if not self._has(plain):
            renamed, _ = self._renamed(plain, [])
            if self._has(renamed):
                found = renamed
        owner, _, leaf = name.rpartition(".")
        inside, _, same = found.rpartition(".")
        if owner and model_name(owner) != inside and leaf == same:
            self.changed[owner] = inside
        elif not owner and found != name:
            self.changed[name] = found
        return found

    def _has(self, name: str) -> bool:
        return name in self.known or (".experts." in name and stack_of(self.model, name) is not None)

    def converted(self, name: str) -> bool:
        """Whether transformers has more to do for this tensor of a file than to rename it."""
        name = model_name(name)
        if name in self.known:
            return False
        return self._renamed(name, self._converters)[1] is not None

    def _renamed(self, name: str, converters: Any) -> tuple[str, str | None]:
        return rename_source_key(
            name, self._renamings, converters, getattr(self.model, "base_model_prefix", ""), self.known
        )

    def split(self, stack: str) -> tuple[set[str], set[str]]:
        """Split the stacked experts of this name, which a file has one by one; returns (the old names, the new)."""
        module = self.model.get_submodule(stack)
        old = {f"{stack}.{part}" for part in module.state_dict()}
        split_(self.model, stack)
        new = {f"{stack}.{part}" for part in self.model.get_submodule(stack).state_dict()}
        self.known = {name: True for name in self.known if name not in old} | dict.fromkeys(new, True)
        return old, new

    def used(self) -> list[WeightRenaming]:
        """The renamings of this class that changed a name: what transformers undoes when it saves."""
        return [renaming for renaming in self._own if renaming.was_used()]
