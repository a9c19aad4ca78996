"""Keep a directory from one job to the next: a volume.

    python examples/volumes.py

A job's root goes with the job. A volume is a disk of a fixed size that stays; its files are below
/volumes/NAME in each job that has it. The certificate's role needs the permission `volumes`, which
an `admin` has.

The server and the client's three files come from WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH
and WORKER_CA_PATH.
"""

import os

import trio

import jobworker

NAME = "example-builds"


async def run(client: jobworker.Client, script: str, path: str = "") -> None:
    """Run a script that has the volume, at `path` or at its default place; print its output."""
    mount = jobworker.VolumeMount(name=NAME, path=path)
    spec = jobworker.JobSpec(command=("sh", "-c", script), volumes=(mount,))
    job = await client.run(spec, follow=True)
    async for chunk in job.output():
        print(chunk.data.decode(errors="replace"), end="")
    record = await job.wait()
    if record.state is not jobworker.State.COMPLETED:
        raise RuntimeError(f"job {job.id} is {record.state.value}: {record.detail}")


async def main() -> None:
    async with jobworker.open_client(
        os.environ["WORKER_SERVER"],
        ca=os.environ["WORKER_CA_PATH"],
        certificate=os.environ["WORKER_CERT_PATH"],
        key=os.environ["WORKER_KEY_PATH"],
    ) as client:
        await client.make_volume(NAME, 32 << 20)
        try:
            await run(client, f"echo built by the first job > /volumes/{NAME}/result")
            await run(client, "cat /srv/builds/result", path="/srv/builds")
            for volume in await client.volumes():
                if volume.name == NAME:
                    print(f"{volume.name}: {volume.size_bytes >> 20} MiB")
        finally:
            await client.remove_volume(NAME)


if __name__ == "__main__":
    trio.run(main)
