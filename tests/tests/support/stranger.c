/*
 * A stranger: a static program without a C library that makes one system call on another process's memory, or on a file that
 * both have mapped: stranger NR A B C D E F, each a number. Exit status 0 if the call said so.
 */
static long call(long nr, const long *a)
{
	long result;
	register long r10 __asm__("r10") = a[3];
	register long r8 __asm__("r8") = a[4];
	register long r9 __asm__("r9") = a[5];

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(nr), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

static long number(const char *text)
{
	long value = 0;

	while (*text)
		value = value * 10 + (*text++ - '0');
	return value;
}

__attribute__((used)) static void run(long *stack)
{
	char **arguments = (char **)(stack + 1);
	long values[7] = { 0 };
	long status[6] = { 0 };

	for (long nth = 1; nth < stack[0] && nth <= 7; nth++)
		values[nth - 1] = number(arguments[nth]);
	status[0] = call(values[0], values + 1) < 0;
	call(60, status);
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\nand $-16, %rsp\ncall run\n");
