from r1v3.cli import main

# Processes that multiprocessing spawns import this file too.
if __name__ == "__main__":
    main()
