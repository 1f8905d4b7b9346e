"""YAML from anywhere: plain values, or one line that says what is wrong."""

import pytest

from qzo.system.as_yaml import read_mapping

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


def written(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_keys_are_text_and_values_plain(tmp_path):
    assert read_mapping(written(tmp_path, "a: 1\n2: [x, null]\n")) == {"a": 1, "2": ["x", None]}
    assert read_mapping(written(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB, r"aliases \(\*a0\) are not read"),
        ("x: &y {a: 1}\nz: {<<: *y}", r"aliases \(\*y\) are not read"),
        ("x: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("x: !!int ''", "a value is not what its tag says"),
        ("x: !!float ''", "a value is not what its tag says"),
        ("x: !!bool maybe", "a value is not what its tag says"),
        ("x: !!timestamp soon", "a value is not what its tag says"),
        ("x: 2001-99-99", "a value is not what its tag says"),
        ("{" * 1000, "is not YAML"),
        ("? [a]\n: b", "unhashable key"),
        (b"\xff", "codec can't decode"),
        ("[1]", "must hold keys and values, got list"),
    ],
)
def test_what_is_no_plain_yaml_is_one_line(tmp_path, text, told):
    with pytest.raises(ValueError, match=rf"x.yaml (is not YAML: )?.*{told}") as caught:
        read_mapping(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
