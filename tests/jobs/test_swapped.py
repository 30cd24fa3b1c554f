"""What is swapped in a library is what it was afterwards, whatever happened inside."""

import pytest

from studio.jobs.base.swapped import swapped


class Parent:
    @staticmethod
    def word() -> str:
        return "library"


class Child(Parent):
    pass


def test_an_attribute_is_another_inside_and_the_same_afterwards() -> None:
    before = vars(Parent)["word"]
    with swapped(Parent, "word", lambda self: "ours"):
        assert (Parent().word(), Child().word()) == ("ours", "ours")
    assert vars(Parent)["word"] is before
    assert Parent().word() == "library"  # still static


def test_it_comes_back_when_the_inside_fails() -> None:
    with pytest.raises(KeyError), swapped(Parent, "word", None):
        raise KeyError
    assert Parent.word() == "library"


@pytest.mark.parametrize("name", ["word", "gone"])
def test_what_an_owner_does_not_define_is_not_swapped(name: str) -> None:
    with pytest.raises(AttributeError, match=f"Child does not define {name}"), swapped(Child, name, None):
        pass
    assert not [key for key in vars(Child) if key == name]
