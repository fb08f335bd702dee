"""Two processes, of which the main one fails by an error that nobody expected."""

from src.utils import distributed


def fail() -> None:
    """Do not know a key."""
    {}["missing"]


if __name__ == "__main__":
    distributed.init_process_group(use_cpu=True)
    try:
        distributed.on_main(fail)
    except Exception as error:
        # torchrun ends the others when one fails: so that each is heard, none does.
        # One write, so that lines do not mix.
        print(f"{distributed.rank()}: {type(error).__name__} {error}\n", end="", flush=True)
    distributed.destroy_process_group()
